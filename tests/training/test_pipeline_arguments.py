"""What a pipeline needs to be opened is given once, to `fit`; `test` and `predict` find it in the quantized model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPAGPipeline
from models import fit_arguments, run_fpq, tiny_text_to_image

from fpq_lightning import CalibrationDataModule, EvaluationConfig, Recipe, RoundingRecipe, SamplerConfig, quantize
from fpq_lightning.diffusion.pipelines import arguments_of_quantized, load_pipeline
from fpq_lightning.storage.export import export
from fpq_lightning.storage.pipeline import load_quantized, pipeline_arguments_of

MISSING = {"safety_checker": None, "feature_extractor": None}
GIVEN = "--pipeline_arguments={safety_checker: null, feature_extractor: null}"


@pytest.fixture(scope="module")
def incomplete(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline that names components which are not there, as one does that was downloaded in part."""
    model = Path(tiny_text_to_image(tmp_path_factory.mktemp("incomplete") / "model"))
    index = json.loads((model / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (model / "model_index.json").write_text(json.dumps(index))
    return str(model)


def _fit(model: str, run: Path, *more: str) -> list[str]:
    options = ["--sampler.prompts=['a cat','a dog']", "--recipe.include=['conv_in']", "--evaluation.features=null"]
    return [*fit_arguments(model, run, iterations=2, n_images=2), *options, *more]


def test_fit_test_and_predict_of_a_pipeline_without_some_components(
    incomplete: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    refused = run_fpq(capsys, _fit(incomplete, run))
    assert refused.code == 1
    assert "cannot load the pipeline" in refused.errors[0]
    fitted = run_fpq(capsys, _fit(incomplete, run, GIVEN))
    assert fitted.code == 0, fitted.err
    quantized = str(run / "quantized")
    assert pipeline_arguments_of(quantized)["safety_checker"] is None
    images, common = tmp_path / "images", ["--trainer.accelerator=cpu", f"--model={quantized}"]
    test = ["test", f"--output={tmp_path / 'test'}", "--evaluation.n_images=2", "--evaluation.features=null"]
    tested = run_fpq(capsys, [*test, *common])
    assert tested.code == 0, tested.err
    assert json.loads((tmp_path / "test" / "report.json").read_text())["variants"]["quantized"]["psnr"]
    predicted = run_fpq(capsys, ["predict", f"--output={images}", "--n_images=2", *common])
    assert predicted.code == 0, predicted.err
    assert len(list(images.glob("*.png"))) == 2


def test_full_precision_models_take_them_in_test_and_predict(
    incomplete: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict = ["predict", f"--model={incomplete}", f"--output={tmp_path}", "--n_images=1", "--prompts=['a cat']"]
    predict += ["--sampler.steps=2", "--trainer.accelerator=cpu"]
    assert run_fpq(capsys, predict).code == 1
    outcome = run_fpq(capsys, [*predict, GIVEN])
    assert outcome.code == 0, outcome.err


def test_python_finds_out_itself_what_a_pipeline_does_without(incomplete: str, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(incomplete, **MISSING)
    quantize(
        pipeline,
        Recipe(include=["conv_in"], rounding=RoundingRecipe(start="nearest", learned=False)),
        tmp_path / "run",
        CalibrationDataModule(n_samples=8, n_search=4, micro_batch=4),
        SamplerConfig(steps=2, batch_size=2, prompts=["a cat"]),
        EvaluationConfig(n_images=0),
        base_model=incomplete,
        accelerator="cpu",
        logger=False,
    )
    kept = pipeline_arguments_of(tmp_path / "run" / "quantized")
    assert MISSING.items() <= kept.items()
    assert load_pipeline(incomplete, arguments=kept).safety_checker is None
    assert load_quantized(tmp_path / "run" / "quantized").safety_checker is None
    export(tmp_path / "run" / "quantized", tmp_path / "plain", "dequantized")
    assert pipeline_arguments_of(tmp_path / "plain") == kept
    assert load_quantized(tmp_path / "plain").safety_checker is None


def test_another_argument_makes_another_run(
    incomplete: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_fpq(capsys, _fit(incomplete, tmp_path / "run", GIVEN)).code == 0
    more = GIVEN.replace("}", ", requires_safety_checker: false}")
    outcome = run_fpq(capsys, _fit(incomplete, tmp_path / "run", more))
    assert "holds another run" in outcome.errors[0]
    assert "pipeline_arguments.requires_safety_checker" in outcome.errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"safety_chequer": None}, "StableDiffusionPipeline has no safety_chequer: leave it out of pipeline_arguments"),
        ({"torch_dtype": "bfloat16"}, "pipeline_arguments cannot hold torch_dtype: use --torch_dtype"),
        ({"token": "hf_x"}, "pipeline_arguments cannot hold token: use the environment variable HF_TOKEN"),
    ],
)
def test_arguments_that_would_be_ignored_or_must_not_be_kept_are_refused(
    arguments: dict[str, Any], message: str, incomplete: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_pipeline(incomplete, arguments={**MISSING, **arguments})
    assert str(error.value) == message


def test_a_variant_is_that_of_the_full_precision_files_alone(incomplete: str, tmp_path: Path) -> None:
    whole = DiffusionPipeline.from_pretrained(incomplete, **MISSING)
    whole.to(torch.float16).save_pretrained(tmp_path / "both", variant="mine")
    loaded = load_pipeline(tmp_path / "both", arguments={"variant": "mine"})
    assert next(loaded.unet.parameters()).dtype == torch.float32
    arguments = {"variant": "mine", "custom_pipeline": "there", "safety_checker": None}
    kept = {"custom_pipeline": "there", "safety_checker": None}
    assert arguments_of_quantized(tmp_path / "both", arguments) == kept


def test_what_a_class_takes_but_does_not_write_into_its_index_is_kept(tmp_path: Path) -> None:
    model = tiny_text_to_image(tmp_path / "model")
    guided = StableDiffusionPAGPipeline.from_pretrained(model, **MISSING, pag_applied_layers=["up"])
    guided.save_pretrained(tmp_path / "guided")
    assert "pag_applied_layers" not in json.loads((tmp_path / "guided" / "model_index.json").read_text())
    given = {"pag_applied_layers": ["up"], "local_files_only": True}
    assert arguments_of_quantized(tmp_path / "guided", given) == {"pag_applied_layers": ["up"]}
