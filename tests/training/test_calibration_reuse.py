"""A calibration set serves the run it was made for, and others only if they would make the same one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import tiny_pipeline

import fpq_lightning as fpq
from fpq_lightning.calibration.disk import load_calibration_set

RECIPE = fpq.Recipe(rounding=fpq.RoundingRecipe(start="nearest"))


def quantize(run_dir: Path, data: fpq.CalibrationDataModule, seed: int = 0) -> None:
    pipeline = tiny_pipeline(seed)
    fpq.quantize(pipeline, RECIPE, run_dir, data, fpq.SamplerConfig(steps=4), accelerator="cpu", logger=False)


def test_one_datamodule_object_makes_each_run_a_set_of_its_own_model(tmp_path: Path) -> None:
    data = fpq.CalibrationDataModule(n_samples=8)
    for seed in (0, 1):
        quantize(tmp_path / str(seed), data, seed)
    first, second = (load_calibration_set(tmp_path / str(seed) / "calibration") for seed in (0, 1))
    assert not torch.equal(first.inputs["sample"], second.inputs["sample"])
    assert data.directory is None


def test_a_named_directory_is_shared_by_runs_that_would_make_the_same_set(tmp_path: Path) -> None:
    directory = str(tmp_path / "set")
    quantize(tmp_path / "a", fpq.CalibrationDataModule(n_samples=8, directory=directory))
    before = {f.name: f.stat().st_mtime_ns for f in Path(directory).iterdir()}
    quantize(tmp_path / "b", fpq.CalibrationDataModule(n_samples=8, n_search=4, directory=directory))
    assert {f.name: f.stat().st_mtime_ns for f in Path(directory).iterdir()} == before


@pytest.mark.parametrize(("options", "model", "named"), [({"seed": 7}, 0, "seed"), ({}, 1, "model")])
def test_a_set_made_otherwise_is_refused_and_told_what_differs(
    options: dict, model: int, named: str, tmp_path: Path
) -> None:
    directory = str(tmp_path / "set")
    quantize(tmp_path / "a", fpq.CalibrationDataModule(n_samples=8, directory=directory))
    with pytest.raises(ValueError, match=rf"calibration set at .* was made with other settings \({named}: "):
        quantize(tmp_path / "b", fpq.CalibrationDataModule(n_samples=8, directory=directory, **options), model)
