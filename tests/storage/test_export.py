"""``fpq export``: from one form of a quantized model to the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from models import STEPS, fit_arguments, run_fpq, save_tiny, tiny_text_to_image
from packed_reader import read_denoiser
from safetensors.numpy import load_file

from fpq_lightning import (
    AttentionRecipe,
    CalibrationDataModule,
    Recipe,
    RoundingRecipe,
    SamplerConfig,
    load_quantized,
    quantize,
)
from fpq_lightning.diffusion.pipelines import load_pipeline
from fpq_lightning.diffusion.sampling import sample, set_sampler
from fpq_lightning.formats.numbers import parse_format
from fpq_lightning.formats.scales import SCALE_FORMATS
from fpq_lightning.nn.attention import quantized_attention
from fpq_lightning.storage.export import find_scale

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``quantized/`` of a run."""
    from fpq_lightning.cli import main

    root = tmp_path_factory.mktemp("export")
    model = save_tiny(root / "model")
    main(fit_arguments(model, root / "run"))
    return root / "run" / "quantized"


def export(capsys: pytest.CaptureFixture[str], source: Path, form: str, output: Path) -> None:
    outcome = run_fpq(capsys, ["export", str(source), f"--format={form}", f"--output={output}"])
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip().splitlines()[-1] == f"wrote {output}"


def images(directory: Path) -> torch.Tensor:
    unet = load_quantized(directory).unet
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet(x, torch.tensor([3, 700])).sample


def test_the_dequantized_form_holds_the_float32_weights_of_the_codes(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(capsys, finished, "dequantized", tmp_path / "plain")
    found = load_file(tmp_path / "plain" / WEIGHTS)
    expected = {k: v for k, v in read_denoiser(finished / "unet").items() if ".inputs." not in k}
    assert found.keys() == expected.keys()
    assert all(found[k].tobytes() == expected[k].tobytes() for k in found)
    assert "quantization_config" not in (tmp_path / "plain" / "unet" / "config.json").read_text()
    description = json.loads((tmp_path / "plain" / "quantization.json").read_text())
    assert description["format_version"] == 1
    assert description["recipe"]["weights"]["formats"] == "fp4"
    plain = DiffusionPipeline.from_pretrained(tmp_path / "plain").unet
    assert {type(m).__module__.split(".")[0] for m in plain.modules()} <= {"torch", "diffusers"}


def test_both_forms_give_the_same_outputs(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(capsys, finished, "dequantized", tmp_path / "plain")
    assert torch.allclose(images(tmp_path / "plain"), images(finished), atol=1e-5)


def test_offsets_of_inputs_survive_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--recipe.activations.formats=uint8", "--recipe.rounding.learned=false"]
    outcome = run_fpq(capsys, [*fit_arguments(save_tiny(tmp_path / "model"), tmp_path / "run"), *options])
    assert outcome.code == 0, outcome.err
    export(capsys, tmp_path / "run" / "quantized", "dequantized", tmp_path / "plain")
    description = json.loads((tmp_path / "plain" / "quantization.json").read_text())
    offsets = [part["offset"] for layer in description["layers"].values() for part in layer["inputs"]]
    assert any(offset not in (None, 0) for offset in offsets)
    assert torch.allclose(images(tmp_path / "plain"), images(tmp_path / "run" / "quantized"), atol=1e-5)


def test_packed_files_come_back_from_the_dequantized_form_with_the_same_weights(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(capsys, finished, "dequantized", tmp_path / "plain")
    export(capsys, tmp_path / "plain", "fpq", tmp_path / "packed")
    found, expected = read_denoiser(tmp_path / "packed" / "unet"), read_denoiser(finished / "unet")
    assert found.keys() == expected.keys()
    assert all(found[k].tobytes() == expected[k].tobytes() for k in found)
    assert torch.equal(images(tmp_path / "packed"), images(finished))
    configs = [json.loads((d / "unet" / "config.json").read_text()) for d in (tmp_path / "packed", finished)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_packed_files_exported_as_such_are_the_same_bytes(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(capsys, finished, "fpq", tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


def test_test_and_predict_take_both_forms(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(capsys, finished, "dequantized", tmp_path / "plain")
    options = [f"--sampler.steps={STEPS}", "--trainer.accelerator=cpu"]
    psnr = []
    for form, model in {"fpq": finished, "dequantized": tmp_path / "plain"}.items():
        output = tmp_path / form
        predicted = run_fpq(
            capsys, ["predict", f"--model={model}", f"--output={output / 'images'}", "--n_images=2", *options]
        )
        assert predicted.code == 0, predicted.err
        assert len(list((output / "images").glob("*.png"))) == 2
        tested = run_fpq(
            capsys, ["test", f"--model={model}", f"--output={output}", "--evaluation.n_images=2", *options]
        )
        assert tested.code == 0, tested.err
        report = json.loads((output / "report.json").read_text())
        assert report["weight_bits"] > 4
        psnr.append(report["variants"]["quantized"]["psnr"])
    assert psnr[0] == pytest.approx(psnr[1], rel=1e-3)


WRONG = {
    "no quantized model": (["MODEL", "--format=fpq", "--output=OUT"], "no quantized pipeline at"),
    "an output that is taken": (["DIR", "--format=fpq", "--output=DIR"], "exists already"),
    "an unknown form": (["DIR", "--format=gguf", "--output=OUT"], "gguf"),
    "no output": (["DIR", "--format=fpq"], "output"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_exported_is_one_line(
    name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = WRONG[name]
    places = {"MODEL": str(finished.parents[1] / "model"), "DIR": str(finished), "OUT": str(tmp_path / "out")}
    for word, place in places.items():
        arguments = [argument.replace(word, place) for argument in arguments]
    before = (finished / WEIGHTS).read_bytes()
    outcome = run_fpq(capsys, ["export", *arguments])
    assert outcome.code != 0
    assert "Traceback" not in outcome.err
    assert len(outcome.errors) == 1
    assert message in outcome.errors[0]
    assert (finished / WEIGHTS).read_bytes() == before
    assert not (tmp_path / "out").exists()


@given(
    st.sampled_from(["e2m1", "e1m2", "e3m0", "e3m2", "e4m3", "float8_e5m2", "int4", "int8"]),
    st.integers(1, 30),
    st.integers(0, 10_000),
)
def test_the_scale_of_decoded_rows_is_found_whatever_codes_they_hold(name: str, n: int, seed: int) -> None:
    fmt, generator = parse_format(name), torch.Generator().manual_seed(seed)
    values = fmt.grid[torch.randint(len(fmt.grid), (20, n), generator=generator)]
    rows = values * torch.empty(20, 1).log_normal_(-4, 2, generator=generator)
    scale = find_scale(rows, fmt)
    assert scale is not None
    assert torch.equal(fmt.quantize(rows / scale) * scale, rows)


@given(st.sampled_from(SCALE_FORMATS.names), st.integers(1, 30), st.integers(0, 10_000))
def test_block_scales_are_found_among_the_numbers_of_their_format(name: str, n: int, seed: int) -> None:
    fmt, scale_format = parse_format("e2m1"), SCALE_FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    values = fmt.grid[torch.randint(len(fmt.grid), (20, n), generator=generator)]
    values[3] = 0
    codes = torch.randint(60, 120, (20, 1), generator=generator)
    rows = values * scale_format.decode(codes) * 2.0**-30
    scale = find_scale(rows, fmt, scale_format)
    assert scale is not None
    assert torch.equal(fmt.quantize(rows / scale) * scale, rows)
    scale_format.encode(scale)  # which refuses others
    assert find_scale(values * 0.3, fmt, scale_format) is None or not values.any()


def test_values_off_the_grid_have_no_scale() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 2.5], [1.0, 1.1, 5.0]])
    assert find_scale(rows[:1], parse_format("e2m1")) is not None
    assert find_scale(rows, parse_format("e2m1")) is None


def test_a_dequantized_form_that_does_not_say_its_granularity_is_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(capsys, finished, "dequantized", tmp_path / "plain")
    file = tmp_path / "plain" / "quantization.json"
    described = json.loads(file.read_text())
    for recipe in (None, [], {"weights": 5}):
        file.write_text(json.dumps({**described, "recipe": recipe}))
        outcome = run_fpq(capsys, ["export", str(file.parent), "--format=fpq", f"--output={tmp_path / 'out'}"])
        assert outcome.code
        assert len(outcome.errors) == 1
        assert "does not say the granularity" in outcome.errors[0]


def test_an_empty_directory_behind_a_link_is_filled(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export(capsys, finished, "fpq", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model_index.json").is_file()


def test_attention_and_other_components_survive_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = load_pipeline(tiny_text_to_image(tmp_path / "tiny"))
    sampler = SamplerConfig(steps=4, batch_size=2, prompts=["a cat", "b"], guidance_scale=3)
    rounding = RoundingRecipe(start="nearest", learned=True, iterations=3, batch_size=4)
    recipe = Recipe(
        attention=AttentionRecipe("fp8"), rounding=rounding, components={"text_encoder": "fp8", "vae": "fp8"}
    )
    data = CalibrationDataModule(n_samples=16, n_search=8, micro_batch=8)
    quantized = quantize(
        pipeline, recipe, tmp_path / "run", data, sampler, accelerator="cpu", logger=False, enable_progress_bar=False
    )
    expected = sample(quantized, sampler, range(2))
    packed = tmp_path / "run" / "quantized"
    export(capsys, packed, "dequantized", tmp_path / "plain")
    export(capsys, tmp_path / "plain", "fpq", tmp_path / "again")
    for directory in (packed, tmp_path / "plain", tmp_path / "again"):
        found = load_quantized(directory)
        set_sampler(found, sampler)
        assert torch.equal(sample(found, sampler, range(2)), expected)
        assert len(quantized_attention(found.unet)) == 8
    # Plain diffusers opens the dequantized form, without activation formats.
    plain = DiffusionPipeline.from_pretrained(tmp_path / "plain")
    assert not quantized_attention(plain.unet)
    assert torch.equal(
        plain.vae.state_dict()["decoder.layers.0.weight"], found.vae.state_dict()["decoder.layers.0.weight"]
    )
