"""What a run will take is said before it starts, and only said if so wished."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import fit_arguments, run_fpq, save_tiny, tiny_pipeline

from fpq_lightning import CalibrationDataModule, Recipe, RoundingRecipe, SamplerConfig
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.training.estimate import Estimate, estimate_run


def _estimate(n_samples: int = 64, iterations: int = 50, n_images: int = 8, world_size: int = 1) -> Estimate:
    return estimate_run(
        tiny_pipeline(),
        Recipe(rounding=RoundingRecipe(start="nearest", learned=True, iterations=iterations)),
        CalibrationDataModule(n_samples=n_samples, micro_batch=8),
        SamplerConfig(steps=4, batch_size=4),
        EvaluationConfig(n_images),
        torch.device("cpu"),
        world_size,
    )


def test_a_dry_run_says_time_memory_and_disk_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "tiny")
    outcome = run_fpq(capsys, [*fit_arguments(model, tmp_path / "run"), "--dry_run=true"])
    assert outcome.code == 0, outcome.err
    for what in ("estimated time: ", "estimated memory: ", "estimated disk: "):
        assert what in outcome.out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_that_cannot_estimate_fails_in_one_line_and_a_run_goes_on_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("the network asks\nfor more")

    monkeypatch.setattr("fpq_lightning.training.run.estimate_run", fail)
    arguments = fit_arguments(save_tiny(tmp_path / "tiny"), tmp_path / "run", iterations=2)
    outcome = run_fpq(capsys, [*arguments, "--dry_run=true"])
    assert outcome.code == 1
    assert outcome.errors == ["fpq: the run cannot be estimated: the network asks for more"]
    assert not (tmp_path / "run").exists()
    outcome = run_fpq(capsys, [*arguments, "--recipe.include=['conv_in']"])
    assert outcome.code == 0, outcome.err
    assert "no estimate (the network asks for more)" in outcome.out


def test_a_run_says_the_same_before_its_first_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(tmp_path / "tiny")
    outcome = run_fpq(capsys, fit_arguments(model, tmp_path / "run", iterations=2))
    assert outcome.code == 0, outcome.err
    assert outcome.out.index("estimated time: ") < outcome.out.index("[ 1/12]")


def test_activations_grow_with_the_samples_and_are_shared_by_processes() -> None:
    one = _estimate(64)
    assert _estimate(128).store_bytes == 2 * one.store_bytes
    assert _estimate(64, world_size=2).store_bytes == one.store_bytes // 2
    weights = sum(p.numel() * p.element_size() for p in tiny_pipeline().unet.parameters())
    assert one.model_bytes == weights


def test_disk_is_enough_for_the_set_the_checkpoints_and_the_model(tmp_path: Path) -> None:
    from fpq_lightning import quantize

    data = CalibrationDataModule(n_samples=64, n_search=8, micro_batch=8)
    sampler, recipe = (
        SamplerConfig(steps=4, batch_size=4),
        Recipe(rounding=RoundingRecipe(start="nearest", learned=True, iterations=10, batch_size=4)),
    )
    quantize(tiny_pipeline(), recipe, tmp_path / "run", data, sampler, accelerator="cpu", enable_progress_bar=False)
    written = sum(f.stat().st_size for f in (tmp_path / "run").rglob("*") if f.is_file() and "logs" not in f.parts)
    assert written / 4 < _estimate(64).disk_bytes < 4 * written


def test_what_lies_beyond_the_budget_is_said() -> None:
    lines = Estimate(5, 100, 4000, 2**20, 3 * 2**30, 2**30, 2**20).lines()
    assert "3.0 GiB, 2.0 GiB of them beyond data.store_budget" in lines[1]
    assert "68 min" in lines[0]
    assert "beyond" not in Estimate(5, 1, 1, 1, 2**20, 2**30, 1).lines()[1]
