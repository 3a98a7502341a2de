"""An export that someone else registers: the command line writes it without a change to the package."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from models import fit_arguments, run_fpq, save_tiny
from packed_reader import read_denoiser
from safetensors.numpy import load_file

from fpq_lightning.nn.packed_layer import packed_layers
from fpq_lightning.storage.exports.registry import EXPORTS, Export, export_help, make_pipeline_plain

WEIGHTS = "diffusion_pytorch_model.safetensors"


def convert(pipeline: DiffusionPipeline, details: Mapping[str, Any], directory: Path) -> None:
    """Plain weights, and a list of formats."""
    formats = {name: layer.weights[0].format.name for name, layer in packed_layers(pipeline.unet).items()}
    (directory / "formats.json").write_text(json.dumps({"recipe": details["recipe"], "formats": formats}))
    make_pipeline_plain(pipeline)


LISTED = Export("listed", "plain weights and a list of formats", "Read `formats.json`.\n", convert)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with EXPORTS.temporarily(LISTED):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``quantized/`` of a run."""
    from fpq_lightning.cli import main

    root = tmp_path_factory.mktemp("made_up")
    main(fit_arguments(save_tiny(root / "model"), root / "run", iterations=3))
    return root / "run" / "quantized"


def test_it_is_written_from_both_forms(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, expected = tmp_path / "plain", read_denoiser(finished / "unet")
    assert run_fpq(capsys, ["export", str(finished), "--format=dequantized", f"--output={plain}"]).code == 0
    for source, output in ((finished, tmp_path / "a"), (plain, tmp_path / "b")):
        outcome = run_fpq(capsys, ["export", str(source), "--format=listed", f"--output={output}"])
        assert outcome.code == 0, outcome.err
        listed = json.loads((output / "formats.json").read_text())
        layers = json.loads((finished / "unet" / "config.json").read_text())["quantization_config"]["layers"]
        assert listed["formats"] == {name: entry["weights"][0]["format"] for name, entry in layers.items()}
        assert listed["recipe"]["weights"]["formats"] == "fp4"
        assert (output / "README.md").read_text().endswith("\n\nRead `formats.json`.\n")
        weights = load_file(output / "unet" / WEIGHTS)
        assert all(np.array_equal(weights[name], expected[name]) for name in weights)
        assert "quantization_config" not in (output / "unet" / "config.json").read_text()


def test_help_and_errors_name_it(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "listed: plain weights and a list of formats" in export_help()
    outcome = run_fpq(capsys, ["export", str(finished), "--format=gguf", f"--output={tmp_path / 'out'}"])
    assert outcome.code
    known = "dequantized, fpq, modelopt, mxfp4, nvfp4 or listed"
    assert outcome.errors == [f"fpq: unknown export format 'gguf': use {known}"]
