"""The shipped configurations parse, and every recipe runs."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import diffusers
import pytest
import yaml
from models import CHECKOUT, fit_arguments, run_fpq, save_tiny
from tiny_pipelines import tiny_pipeline

STUDIES = sorted((CHECKOUT / "configs" / "study").glob("*.yaml"))
CONFIGS = sorted({*(CHECKOUT / "configs").rglob("*.yaml")} - {*STUDIES})
READY = {
    name: (kind, inputs)
    for name, kind, inputs in re.findall(
        r"^\| `(\w+)` \| .+ \| `(\w+)` \| (.+) \|$",
        (CHECKOUT / "docs" / "guide" / "model.md").read_text(),
        re.MULTILINE,
    )
}
STAND_INS = {"wan2_2_t2v_a14b": "WanPipeline 2.2"}
MODELS = [file for file in CONFIGS if file.parent.name == "models"]
REHEARSED = ("kandinsky_2_2_prior", "stable_audio_open", "wan2_2_t2v_a14b")
RECIPES = [file for file in CONFIGS if file.parent.name == "recipes"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def _leaves(value: object, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, child in value.items() for k, v in _leaves(child, (*path, key)).items()}


def test_there_are_configurations() -> None:
    assert len(RECIPES) >= 5
    assert CHECKOUT / "configs" / "quickstart.yaml" in CONFIGS


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
@pytest.mark.parametrize("by", ["path", "name"])
def test_a_configuration_parses_to_the_values_it_holds(
    file: Path, by: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CHECKOUT)  # the quickstart names its data relative to the checkout
    name = str(file) if by == "path" else file.stem
    outcome = run_fpq(capsys, ["fit", "--config", name, "--model", "X", "--print_config"])
    assert outcome.code == 0, outcome.err
    found = _leaves(yaml.safe_load(outcome.out))
    expected = {**_leaves(yaml.safe_load(file.read_text())), ("model",): "X"}
    assert {k: found.get(k) for k in expected} == expected


def test_the_guide_lists_the_configurations_of_models_with_their_inputs() -> None:
    assert READY.keys() == {file.stem for file in MODELS}
    for file in MODELS:
        values = yaml.safe_load(file.read_text())
        assert values["model"].count("/") == 1  # as users know it
        assert ("inputs" in values["sampler"]) == (READY[file.stem][1] != "-")
        assert values.get("pipeline", READY[file.stem][0]) == READY[file.stem][0]


@pytest.mark.parametrize("file", MODELS, ids=lambda f: f.stem)
def test_the_pipeline_of_a_model_takes_what_its_configuration_gives(file: Path) -> None:
    kind, inputs = READY[file.stem]
    given = yaml.safe_load(file.read_text())["sampler"]
    names = {"steps": "num_inference_steps", "prompts": "prompt"}
    own = {"scheduler", "arguments", "inputs", "prompt_column", "batch_size"}
    called = {names.get(name, name) for name in given.keys() - own}
    called |= given.get("arguments", {}).keys() | set(re.findall(r"`(\w+)`", inputs))
    assert called <= inspect.signature(getattr(diffusers, kind).__call__).parameters.keys()


@pytest.mark.filterwarnings("error:.*left out")  # statistics or calls of the denoiser
@pytest.mark.parametrize(
    "file",
    [pytest.param(f, id=f.stem, marks=[pytest.mark.rehearsed] if f.stem in REHEARSED else []) for f in MODELS],
)
def test_the_configuration_of_a_model_runs_whole_on_a_small_pipeline_of_its_class(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, _ = READY[file.stem]
    values = yaml.safe_load(file.read_text())
    pipeline, small = tiny_pipeline(STAND_INS.get(file.stem, kind), tmp_path)
    given = values["sampler"]
    assert ("prompts" in given) == (small["prompts"] is not None)
    small["arguments"] = {**given.get("arguments", {}), **small.get("arguments", {})}
    if "pipeline" in values:  # the repository names another class
        pipeline = diffusers.StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    pipeline.save_pretrained(tmp_path / "tiny")
    options = {"model": tmp_path / "tiny", "run_dir": tmp_path / "run", "trainer.accelerator": "cpu"}
    options |= {"data.n_samples": 4, "data.n_search": 2}
    options["evaluation.n_images"] = 2
    options |= {f"sampler.{name}": json.dumps(small.get(name)).strip('"') for name in ("height", "width", *small)}
    outcome = run_fpq(capsys, ["fit", "--config", file.stem, *(f"--{k}={v}" for k, v in options.items())])
    assert outcome.code == 0, outcome.err
    assert "estimated time: " in outcome.out

    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["quantized_share"] > 0.4
    quantized = tmp_path / "run" / "quantized"
    assert json.loads((quantized / "model_index.json").read_text())["_class_name"] == kind
    assert report["variants"]["quantized"]["n_images"] == 2
    words = ["predict", f"--model={quantized}", f"--output={tmp_path / 'images'}", "--n_images=1"]
    outcome = run_fpq(capsys, [*words, "--trainer.accelerator=cpu"])
    assert outcome.code == 0, outcome.err
    (written,) = (tmp_path / "images").iterdir()
    assert written.suffix == {"video": ".webp", "sound": ".wav", "latent": ".npy"}.get(report["medium"], ".png")


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_a_recipe_runs_end_to_end(file: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, *options = fit_arguments(model, tmp_path / "run", iterations=5)
    outcome = run_fpq(capsys, [command, "--config", file.stem, *options])
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    recipe = yaml.safe_load(file.read_text())["recipe"]
    assert report["recipe"]["weights"]["formats"] == recipe["weights"]["formats"]
    assert all(0 < b["error_quantized"] <= b["error_nearest"] < 1 for b in report["blocks"])
    used = {f for b in report["blocks"] for names in b["weight_formats"].values() for f in names}
    inputs = {f for b in report["blocks"] for names in b["activation_formats"].values() for f in names}
    if file.stem == "fp8_fp8_hardware":
        assert (used, inputs) == ({"float8_e4m3fn"}, {"float8_e4m3fn"})
    elif "hardware" in file.stem or file.stem in ("nvfp4", "mxfp4"):
        assert (used, inputs) == ({"float4_e2m1fn"}, {"float8_e4m3fn"})
    elif "int" in file.stem:
        assert (used, inputs) == ({"uint4"}, {"uint8"})
    else:
        assert used <= {"e2m1", "e1m2", "e3m0", "e5m2", "e4m3", "e3m4", "e2m5"}
        assert any(name.startswith("u") for name in inputs) == (file.stem == "fp8_fp8")
