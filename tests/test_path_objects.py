"""`Path` objects are taken wherever a path is, from the model that is loaded to the files that are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from models import save_tiny

import fpq_lightning as fpq
from fpq_lightning.cli import main
from fpq_lightning.diffusion.prompts import load_prompts
from fpq_lightning.storage.export import export
from fpq_lightning.study.config import StudyConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a pipeline that was loaded from a `Path`."""
    directory = tmp_path_factory.mktemp("run")
    save_tiny(directory / "model")
    pipeline = DiffusionPipeline.from_pretrained(directory / "model")
    assert isinstance(pipeline.name_or_path, Path)
    pipeline.set_progress_bar_config(disable=True)
    fpq.quantize(
        pipeline,
        fpq.Recipe(rounding=fpq.RoundingRecipe(start="nearest", learned=False), include=["conv_in", "conv_out"]),
        directory / "run",
        fpq.CalibrationDataModule(n_samples=16, n_search=8, directory=directory / "calibration"),  # type: ignore[arg-type]
        fpq.SamplerConfig(steps=4, batch_size=4),
        fpq.EvaluationConfig(n_images=2, features=None, images=directory / "images"),  # type: ignore[arg-type]
        accelerator="cpu",
    )
    return directory / "run"


def test_a_run_and_what_it_wrote_are_named_by_paths(run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "quantized" / "unet" / "config.json").read_text())
    assert config["quantization_config"]["base_model"] == str(run.parent / "model")
    assert any((run.parent / "images").iterdir())
    export(run / "quantized", tmp_path / "plain", "dequantized")
    opened, plain = (fpq.load_quantized(path).unet for path in (run / "quantized", tmp_path / "plain"))
    assert torch.equal(opened.conv_in.weight, plain.conv_in.weight)
    again = type(opened).from_pretrained(run / "quantized", subfolder=Path("unet"))
    assert torch.equal(again.conv_in.weight, opened.conv_in.weight)


def test_the_command_line_takes_paths(run: Path, tmp_path: Path) -> None:
    main(["inspect", run / "quantized"])
    main(["export", run / "quantized", "--format", "dequantized", "--output", tmp_path / "plain"])
    assert (tmp_path / "plain" / "model_index.json").is_file()


def test_options_keep_paths_as_text(tmp_path: Path) -> None:
    study = StudyConfig(tmp_path, tmp_path / "out", {}, scratch=tmp_path)  # type: ignore[arg-type]
    assert (study.model, study.output, study.scratch) == (str(tmp_path), str(tmp_path / "out"), str(tmp_path))
    assert fpq.EvaluationConfig(real=tmp_path / "a.safetensors").real_statistics  # type: ignore[arg-type]
    (tmp_path / "prompts.txt").write_text("a cat")
    assert load_prompts(tmp_path / "prompts.txt") == ["a cat"]
