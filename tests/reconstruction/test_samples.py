"""Which samples of the calibration set a choice may look at, and how much each of them counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DDPMPipeline
from models import tiny_pipeline
from torch import Tensor, nn

from fpq_lightning import (
    ActivationRecipe,
    CalibrationDataModule,
    Recipe,
    RoundingRecipe,
    SamplerConfig,
    WeightRecipe,
    quantize,
)
from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.calibration.disk import save_calibration_set

SAMPLES, TRAIN = 24, 18  # the last six are held out
E2M1 = torch.tensor([-6.0, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def make_set(change: dict[int, float] | None = None) -> CalibrationSet:
    """Samples whose mean grows with their weight; `change` multiplies some of them."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(SAMPLES, generator=generator) ** 4
    weights = weights / weights.mean()
    sample = 0.3 * torch.randn(SAMPLES, 3, 8, 8, generator=generator) + weights[:, None, None, None]
    for row, factor in (change or {}).items():
        sample[row] *= factor
    timestep = torch.randint(1000, (SAMPLES,), generator=generator)
    return CalibrationSet({"sample": sample, "timestep": timestep}, weights, {"return_dict": False})


def quantize_conv_in(
    directory: Path, calibration: CalibrationSet, recipe: Recipe, callbacks: Sequence[pl.Callback] = ()
) -> DDPMPipeline:
    save_calibration_set(calibration, directory / "set")
    data = CalibrationDataModule(
        n_samples=SAMPLES,
        held_out_fraction=1 - TRAIN / SAMPLES,
        n_search=64,  # more than there are
        micro_batch=7,
        directory=str(directory / "set"),
    )
    pipeline = tiny_pipeline()
    quantize(
        pipeline, recipe, directory / "run", data, SamplerConfig(steps=4), accelerator="cpu", callbacks=[*callbacks]
    )
    return pipeline


def recipe(learned: bool, correct_biases: bool, activations: str | None = None) -> Recipe:
    return Recipe(
        WeightRecipe("fp4"),
        ActivationRecipe(activations, objective="output"),
        rounding=RoundingRecipe(start="nearest", learned=learned, iterations=60, batch_size=6),
        include=["conv_in"],
        correct_biases=correct_biases,
    )


def variant(pipeline: DDPMPipeline, name: str) -> Any:
    return pipeline.unet.conv_in.variants[name]


def scales(pipeline: DDPMPipeline) -> list[Any]:
    """Format and scale of the weight and the input that the search chose."""
    nearest = variant(pipeline, "nearest")
    return [(q.format.name, q.scale.tolist()) for q in [*nearest.weights, *nearest.inputs]]


def test_the_search_does_not_see_held_out_samples(tmp_path: Path) -> None:
    plain = recipe(learned=False, correct_biases=False, activations="fp8")
    found = {
        name: scales(quantize_conv_in(tmp_path / name, make_set(change), plain))
        for name, change in {
            "as it is": None,
            "other held-out samples": dict.fromkeys(range(TRAIN, SAMPLES), -30.0),
            "another sample to search": {TRAIN - 1: -30.0},
        }.items()
    }
    assert found["other held-out samples"] == found["as it is"]
    assert found["another sample to search"] != found["as it is"]  # the search sees all the others


class Batches(pl.Callback):
    """Numbers of the samples that the optimisation steps were made on."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Tensor, batch_idx: int) -> None:
        self.seen += batch.flatten().tolist()


def test_learning_sees_every_sample_but_those_held_out(tmp_path: Path) -> None:
    batches = Batches()
    quantize_conv_in(tmp_path, make_set(), recipe(learned=True, correct_biases=False), [batches])
    assert len(batches.seen) == 60 * 6
    assert set(batches.seen) == set(range(TRAIN))


def test_the_correction_of_the_bias_is_the_weighted_mean_error_of_the_samples_that_are_learned_from(
    tmp_path: Path,
) -> None:
    calibration, layer = make_set(), tiny_pipeline().unet.conv_in
    pipeline = quantize_conv_in(tmp_path, calibration, recipe(learned=False, correct_biases=True))
    quantizer = variant(pipeline, "nearest").weights[0]
    rows = layer.weight.detach().double().flatten(1)
    grid = (E2M1 if quantizer.format.name == "e2m1" else quantizer.format.grid.double()) * quantizer.scale.double()
    nearest = (rows[..., None] - grid[:, None]).abs().argmin(-1)
    rounded = grid.gather(1, nearest).reshape(layer.weight.shape)
    x = calibration.inputs["sample"].double()
    bias = layer.bias.detach().double()

    def mean_error(weights: Tensor, samples: slice) -> Tensor:
        error = nn.functional.conv2d(x[samples], layer.weight.double() - rounded, padding=1).mean((2, 3))
        return (error * weights[samples, None].double()).sum(0) / weights[samples].double().sum()

    expected = mean_error(calibration.weights, slice(0, TRAIN))
    found = variant(pipeline, "quantized").bias.double() - bias
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-5)
    size = expected.abs().max()
    for other in (
        mean_error(torch.ones(SAMPLES), slice(0, TRAIN)),
        mean_error(calibration.weights, slice(0, SAMPLES)),
        mean_error(calibration.weights, slice(TRAIN, SAMPLES)),
    ):
        assert (other - expected).abs().max() > 0.05 * size  # all of them are told apart
