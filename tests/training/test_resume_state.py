"""What a checkpoint in the middle of a unit holds, and that a run goes on from it as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from models import quantized_files, tiny_pipeline
from torch import Tensor

from fpq_lightning import CalibrationDataModule, Recipe, RoundingRecipe, SamplerConfig, quantize

BATCHES = 8  # of each unit, of ten steps
ITERATIONS = 10 * BATCHES
SAVED = 2  # of those of the second unit, when the checkpoint is written


class _StopError(Exception):
    pass


@dataclass
class Watcher(pl.Callback):
    """Copies what is learned after every batch, by unit and batch; may save a checkpoint after one and stop later.

    Args:
        file: of the checkpoint; without one the run goes on to its end.
    """

    file: Path | None = None
    states: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        place = pl_module.plan.unit, batch_idx
        if trainer.optimizers:
            self.states[place] = flat(trainer.optimizers[0])
        if self.file is not None and place == (1, SAVED - 1):
            trainer.save_checkpoint(self.file, weights_only=False)
        if self.file is not None and place == (1, SAVED + 1):  # what follows the checkpoint is lost
            raise _StopError


def flat(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of an optimiser's variables, moments and counts, by name."""
    found = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            values = {"value": parameter, **optimizer.state[parameter]}
            found |= {f"{g}.{i}.{name}": torch.as_tensor(value).detach().clone() for name, value in values.items()}
    return found


@dataclass
class Runs:
    whole: Watcher
    resumed: Watcher
    directories: dict[str, Path]
    checkpoint: dict[str, Any]


def calibrate(directory: Path, start: str, watcher: Watcher, ckpt_path: str | None = None) -> None:
    quantize(
        tiny_pipeline(),
        Recipe(
            rounding=RoundingRecipe(start=start, learned=True, iterations=ITERATIONS, batch_size=4),
            include=["conv_in", "mid_block.resnets.*"],
        ),
        directory,
        CalibrationDataModule(n_samples=16, n_search=8, micro_batch=8),
        SamplerConfig(steps=4, batch_size=4),
        base_model="tiny",
        ckpt_path=ckpt_path,
        accelerator="cpu",
        callbacks=[watcher],
    )


@pytest.fixture(scope="module", params=["nearest", "closed_form"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("resume")
    directories = {name: root / name for name in ("whole", "resumed")}
    file = root / "middle.ckpt"
    whole, resumed = Watcher(), Watcher()
    calibrate(directories["whole"], request.param, whole)
    with pytest.raises(_StopError):
        calibrate(directories["resumed"], request.param, Watcher(file))
    calibrate(directories["resumed"], request.param, resumed, str(file))
    return Runs(whole, resumed, directories, torch.load(file, weights_only=True))


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]


def test_a_resumed_unit_goes_on_at_the_batch_after_its_checkpoint(runs: Runs) -> None:
    second = [batch for unit, batch in runs.resumed.states if unit == 1]
    assert second == list(range(SAVED, BATCHES))
    assert not [place for place in runs.resumed.states if place[0] == 0]
    assert [batch for unit, batch in runs.whole.states if unit == 1] == list(range(BATCHES))


def test_variables_and_adams_moments_are_those_of_the_uninterrupted_run_bit_for_bit(runs: Runs) -> None:
    for place, found in runs.resumed.states.items():
        assert differing(found, runs.whole.states[place]) == []
    first = runs.resumed.states[1, SAVED]
    for kind in ("value", "exp_avg", "exp_avg_sq"):
        assert any(name.endswith(f".{kind}") and value.any() for name, value in first.items())
    assert {int(value) for name, value in first.items() if name.endswith(".step")} == {10 * (SAVED + 1)}


def test_the_checkpoint_holds_variables_and_moments_as_they_were(runs: Runs) -> None:
    expected = runs.whole.states[1, SAVED - 1]
    (saved,) = runs.checkpoint["optimizer_states"]
    moments = [
        saved["state"][number][kind]
        for group in saved["param_groups"]
        for number in group["params"]
        for kind in ("exp_avg", "exp_avg_sq")
    ]
    wanted = [value for name, value in expected.items() if name.endswith(("exp_avg", "exp_avg_sq"))]
    assert len(moments) == len(wanted) > 4
    assert all(torch.equal(a, b) for a, b in zip(moments, wanted, strict=True))
    # A variable of the checkpoint for each of the run, whatever their names and order there.
    kept = [value for value in _tensors(runs.checkpoint["fpq"]) if value.is_floating_point()]
    for name, value in expected.items():
        if name.endswith(".value"):
            assert any(torch.equal(value, other) for other in kept), name


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def test_the_quantized_model_is_that_of_the_uninterrupted_run_to_the_byte(runs: Runs) -> None:
    whole, resumed = (quantized_files(runs.directories[name]) for name in ("whole", "resumed"))
    assert whole == resumed
    assert whole
