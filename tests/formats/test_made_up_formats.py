"""Formats that someone else registers: they work everywhere without a change to the package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, UNet2DModel
from models import CHECKOUT, fit_arguments, run_fpq, save_tiny, tiny_pipeline

import fpq_lightning as fpq
from fpq_lightning.cli import main
from fpq_lightning.formats.numbers import FAMILIES, FORMATS, Family, parse_formats
from fpq_lightning.formats.scales import SCALE_FORMATS, ScaleFormat
from fpq_lightning.nn.calibrated import quantized_layers
from fpq_lightning.nn.convert import quantized_weight
from fpq_lightning.nn.packed_layer import packed_layers
from fpq_lightning.nn.packed_weight import BlockScaledWeight
from fpq_lightning.storage.pipeline import save_quantized

NUMBERS = fpq.FloatFormat(3, 1, reserved=1, hardware_name="float5_e3m1xn")
GRID = torch.tensor([m * x for m in (-1, 1) for x in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)]) / 8
FAMILY = Family("fp5", ("float5_e3m1xn", "e2m2"))
SCALES = ScaleFormat(
    "float8_ue5m3",
    torch.uint8,
    (1, 0xFE),
    lambda codes: (codes.int() << 20).view(torch.float32) * 2.0**112,
    relative=False,
    shifts=(-1, 0, 1),
)
FEATURES = CHECKOUT / "data" / "cifar10-features"
WEIGHTS = {"formats": NUMBERS.name, "granularity": "group", "group_size": 8, "scale_format": SCALES.name}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with FORMATS.temporarily(NUMBERS), FAMILIES.temporarily(FAMILY), SCALE_FORMATS.temporarily(SCALES):
        yield


def test_a_name_is_read_listed_and_refused_once_it_is_gone() -> None:
    assert fpq.parse_format("FLOAT5_e3m1xn") is NUMBERS
    assert [f.name for f in parse_formats("fp5")] == ["float5_e3m1xn", "e2m2"]
    with pytest.raises(ValueError, match=r"unknown format 'fp7': .*\bfp5\b.*\bfloat5_e3m1xn"):
        fpq.parse_format("fp7")
    with pytest.raises(ValueError, match=r"unknown scale_format 'e9': use float32, .*\bfloat8_ue5m3"):
        fpq.Recipe(weights=fpq.WeightRecipe(**{**WEIGHTS, "scale_format": "e9"}))


def weights_of(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The quantized weights of a packed network, of which some are in blocks and all on the grid."""
    layers = packed_layers(unet)
    parts = [part for layer in layers.values() for part in layer.weights]
    assert {part.format for part in parts} == {NUMBERS}
    blocks = [part for part in parts if isinstance(part, BlockScaledWeight)]
    assert len(blocks) > 20
    for part in blocks:
        assert part.scale_format is SCALES
        steps = torch.frexp(part.scale)[0] * 16  # three bits behind the first one
        assert torch.equal(steps, steps.round())
        values = part().reshape(*part.scale.shape, -1) / part.scale[..., None]
        assert torch.isin(values, GRID).all()
    return {name: layer.decode_weight() for name, layer in layers.items()}


def test_a_quantized_pipeline_is_saved_and_opened_to_the_same_bits(tmp_path: Path) -> None:
    recipe = fpq.Recipe(
        weights=fpq.WeightRecipe(**WEIGHTS),
        rounding=fpq.RoundingRecipe(start="nearest", learned=True, iterations=3, batch_size=4),
    )
    data = fpq.CalibrationDataModule(n_samples=8, n_search=4, micro_batch=4)
    pipeline = fpq.quantize(
        tiny_pipeline(), recipe, tmp_path / "run", data, fpq.SamplerConfig(steps=4, batch_size=4),
        accelerator="cpu", logger=False, enable_progress_bar=False,
    )  # fmt: skip
    expected = {name: quantized_weight(layer) for name, layer in quantized_layers(pipeline.unet).items()}
    found = weights_of(DiffusionPipeline.from_pretrained(tmp_path / "run" / "quantized").unet)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_weights_are_quantized_while_they_are_loaded(tmp_path: Path) -> None:
    config = fpq.FPQConfig(NUMBERS.name, "group", 8, scale_format=SCALES.name)
    unet = UNet2DModel.from_pretrained(Path(save_tiny(tmp_path / "tiny")) / "unet", quantization_config=config)
    unet.save_pretrained(tmp_path / "packed")
    expected, found = weights_of(unet), weights_of(UNet2DModel.from_pretrained(tmp_path / "packed"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layouts_of_others_do_not_take_scales_that_only_look_like_theirs(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    config = fpq.FPQConfig("float4_e2m1fn", "group", 32, scale_format=SCALES.name)
    model = Path(save_tiny(tmp_path / "tiny")) / "unet"
    pipeline.register_modules(unet=UNet2DModel.from_pretrained(model, quantization_config=config))
    with pytest.raises(ValueError, match="no layer fits"):
        save_quantized(pipeline, tmp_path / "out", {}, "mxfp4")
    config = fpq.FPQConfig("float4_e2m1fn", "group", 32, scale_format="float8_e8m0fnu")
    pipeline.register_modules(unet=UNet2DModel.from_pretrained(model, quantization_config=config))
    with pytest.warns(UserWarning, match="do not fit"):
        save_quantized(pipeline, tmp_path / "out", {}, "mxfp4")


def test_the_command_line_its_report_and_the_export_know_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = fit_arguments(save_tiny(tmp_path / "tiny"), run, iterations=3, n_images=2)
    options = [f"--recipe.weights.{key}={value}" for key, value in {**WEIGHTS, "formats": FAMILY.name}.items()]
    outcome = run_fpq(capsys, [*arguments, *options, f"--evaluation.features={FEATURES}"])
    assert outcome.code == 0, outcome.err
    text = (run / "report.md").read_text()
    assert f"{FAMILY.name} weights" in text
    assert NUMBERS.name in text
    expected = read_weights(run / "quantized")
    for form, source in (("dequantized", run / "quantized"), ("fpq", tmp_path / "dequantized")):
        outcome = run_fpq(capsys, ["export", str(source), f"--format={form}", f"--output={tmp_path / form}"])
        assert outcome.code == 0, outcome.err
    found = read_weights(tmp_path / "fpq")  # formats and scales were found in the float32 weights
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    layers = packed_layers(DiffusionPipeline.from_pretrained(directory).unet)
    return {name: layer.decode_weight() for name, layer in layers.items()}


def test_a_study_has_a_row_of_them(tmp_path: Path) -> None:
    values = {
        "model": save_tiny(tmp_path / "tiny"),
        "output": str(tmp_path / "study"),
        "scratch": str(tmp_path / "scratch"),
        "sampler": {"steps": 2, "batch_size": 2},
        "evaluation": {"n_images": 2},
        "recipe": {
            "rounding": {"start": "nearest", "learned": True, "iterations": 2, "batch_size": 2},
            "include": ["conv_in", "mid_block.resnets.0.*"],
        },
        "data": {"n_samples": 4, "n_search": 2, "micro_batch": 2},
        "rows": {"new": {"recipe": {"weights": WEIGHTS}, "variants": ["nearest"]}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    main(["study", "--config", str(tmp_path / "study.yaml")])
    row = json.loads((tmp_path / "study" / "rows" / "new.nearest.json").read_text())
    assert row["settings"]["recipe"]["weights"]["scale_format"] == SCALES.name
    assert 5 + 8 / 8 <= row["weight_bits"] < 6.5  # a few layers have one float32 scale a channel
    assert "| new | nearest |" in (tmp_path / "study" / "table.md").read_text()
