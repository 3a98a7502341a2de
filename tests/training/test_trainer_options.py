"""Options of Lightning's trainer that change what is learned are in the fingerprint, or refused before the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from models import fit_arguments, run_fpq, save_tiny, tiny_pipeline

import fpq_lightning as fpq
from fpq_lightning.training.strategy import TRAINER_DEFAULTS, check_trainer

REFUSED: dict[str, Any] = {
    "limit_train_batches": 1,  # which is not 1.0
    "limit_val_batches": 0.5,
    "overfit_batches": 1,
    "fast_dev_run": True,
    "val_check_interval": 0.5,
    "check_val_every_n_epoch": 2,
    "reload_dataloaders_every_n_epochs": 0,
    "accumulate_grad_batches": 2,
    "gradient_clip_val": 0.5,
    "max_steps": 3,
    "max_time": "00:01:00:00",
    "precision": "64-true",
}


def _trainer(**options: Any) -> pl.Trainer:
    return pl.Trainer(**{**TRAINER_DEFAULTS, "accelerator": "cpu", "logger": False, **options})


def test_options_that_change_nothing_are_taken() -> None:
    check_trainer(_trainer())
    check_trainer(_trainer(log_every_n_steps=3, limit_train_batches=1.0, max_epochs=4, precision="bf16-mixed"))


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_changes_what_is_learned_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.{option} "):
        check_trainer(_trainer(**{option: REFUSED[option]}))


@pytest.mark.parametrize("option", ["limit_train_batches", "max_time", "precision"])
def test_such_an_option_ends_the_command_before_the_run(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "model")
    arguments = [*fit_arguments(model, tmp_path / "run"), f"--trainer.{option}={REFUSED[option]}"]
    outcome = run_fpq(capsys, arguments)
    assert outcome.code == 1
    assert len(outcome.errors) == 1, outcome.err
    assert f"trainer.{option}" in outcome.errors[0]
    assert not (tmp_path / "run").exists()


def test_another_precision_is_another_run(tmp_path: Path) -> None:
    def quantize(**options: Any) -> None:
        recipe = fpq.Recipe(rounding=fpq.RoundingRecipe("nearest"), include=["conv_in"])
        data = fpq.CalibrationDataModule(n_samples=8, n_search=4, micro_batch=4)
        sampler = fpq.SamplerConfig(steps=2, batch_size=4)
        fpq.quantize(tiny_pipeline(), recipe, tmp_path / "run", data, sampler, accelerator="cpu", **options)

    quantize(precision="bf16-mixed")
    made_from = json.loads((tmp_path / "run" / "fingerprint.json").read_text())["parts"]
    assert made_from["trainer"] == {"precision": "bf16-mixed"}
    with pytest.raises(ValueError, match=r"trainer\.precision"):
        quantize(precision=32)
    with pytest.raises(ValueError, match="holds this run, finished"):
        quantize(precision="bf16-mixed")


def test_a_precision_that_comes_from_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_TRAINER_PRECISION", "bf16-mixed")
    with pytest.raises(ValueError, match=r"precision is bf16-mixed: give it as trainer\.precision"):
        fpq.quantize(tiny_pipeline(), run_dir=tmp_path / "run", accelerator="cpu")
