"""How rounding is learned, against AdaRound written out in float64: losses, learning rates, variables."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, field
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
from fpq_lightning.calibration.disk import load_calibration_set

STEPS_A_BATCH = 10  # Lightning's callbacks see the last of so many steps
SAMPLES, TRAIN = 16, 12
NEAREST = "nearest"
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
STEPS = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0], dtype=torch.float64)  # above each of them


@dataclass
class Recorder(pl.Callback):
    """What Lightning's own interfaces show of a run: logged values, and the optimiser's variables and rates."""

    losses: list[dict[str, float]] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    variables: list[list[Tensor]] = field(default_factory=list)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if not trainer.optimizers:
            return  # a unit in which nothing is learned
        self.losses.append({name: value.item() for name, value in trainer.callback_metrics.items()})
        groups = trainer.optimizers[0].param_groups
        self.rates.append([float(group["lr"]) for group in groups])
        self.variables.append([p.detach().clone() for group in groups for p in group["params"]])


def learn(
    directory: Path,
    pipeline: DDPMPipeline,
    layers: str,
    recorder: Recorder,
    activations: str | None = None,
    **rounding: Any,
) -> tuple[Tensor, Tensor]:
    """Quantizes some layers, their weights to E2M1, every step on all samples that are learned from.

    Returns:
        The samples that the denoiser saw, float64 `[16, 3, 8, 8]`, and their weights.
    """
    recipe = Recipe(
        WeightRecipe("e2m1"),
        ActivationRecipe(activations),
        rounding=RoundingRecipe(**{"start": "nearest", "learned": True, "batch_size": TRAIN, **rounding}),
        include=[layers],
        correct_biases=False,
    )
    data = CalibrationDataModule(n_samples=SAMPLES, held_out_fraction=1 - TRAIN / SAMPLES, micro_batch=5)
    sampler = SamplerConfig(steps=4, batch_size=4)
    quantize(pipeline, recipe, directory, data, sampler, accelerator="cpu", callbacks=[recorder])
    calibration = load_calibration_set(directory / "calibration")
    return calibration.inputs["sample"].double(), calibration.weights.double()


class AdaRound:
    """Learned rounding of one convolution as published, in float64.

    Args:
        layer: in full precision.
        scale: of nearest rounding, `[out, 1]`.
        x: samples `[n, ...]`, of which the last ones are held out.
        weights: of the samples.
    """

    def __init__(self, layer: nn.Conv2d, scale: Tensor, x: Tensor, weights: Tensor) -> None:
        self.layer, self.scale, self.x, self.weights = layer, scale.double(), x, weights
        rows = layer.weight.detach().double().flatten(1) / self.scale
        self.sign, magnitude = torch.where(rows < 0, -1.0, 1.0), rows.abs().clamp(max=6)
        below = torch.searchsorted(E2M1, magnitude, right=True) - 1
        self.base, self.step = E2M1[below], STEPS[below]
        h = ((magnitude - self.base) / self.step).clamp(0.01, 0.99)
        self.v = torch.logit((h + 0.1) / 1.2).requires_grad_()
        self.gain = torch.zeros_like(self.scale, requires_grad=True)
        self.target = self.convolve(layer.weight.double()).detach()
        held_out = slice(TRAIN, None)
        self.nearest_error = self.error((h >= 0.5).double(), held_out).item()

    def convolve(self, weight: Tensor) -> Tensor:
        bias = self.layer.bias.double()
        return nn.functional.conv2d(self.x, weight, bias, padding=self.layer.padding)

    def h(self) -> Tensor:
        return (1.2 * torch.sigmoid(self.v) - 0.1).clamp(0, 1)

    def error(self, up: Tensor, samples: slice) -> Tensor:
        """Weighted error of the output over the weighted energy of the target."""
        rows = self.sign * (self.base + up * self.step).clamp(max=6) * self.scale * self.gain.exp()
        difference = self.convolve(rows.reshape(self.layer.weight.shape)) - self.target
        energies = [(x.square().mean((1, 2, 3)) * self.weights)[samples].sum() for x in (difference, self.target)]
        return energies[0] / energies[1]

    def losses(self, progress: float, regularisation: float, warmup: float, straight_through: float) -> list[Tensor]:
        h = self.h()
        up = h + ((self.v >= 0).double() - h).detach() if progress >= straight_through else h
        beta = 2 + 9 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
        strength = 0.0 if progress < warmup else regularisation
        rounding = strength * (1 - (2 * h - 1).abs() ** beta).mean()
        return [self.error(up, slice(0, TRAIN)) / self.nearest_error, rounding]


@pytest.fixture(scope="module")
def untouched() -> nn.Conv2d:
    return tiny_pipeline().unet.conv_in


def nearest_scale(pipeline: DDPMPipeline) -> Tensor:
    return pipeline.unet.conv_in.variants[NEAREST].weights[0].scale


def test_a_unit_is_learned_as_adaround_written_out_in_float64(tmp_path: Path) -> None:
    """Losses, learning rates and variables of every tenth step of 60, soft and then hard."""
    options = {"regularisation": 0.3, "warmup": 0.25, "straight_through": 0.5}
    n, rates, pipeline, recorder = (
        60,
        {"learning_rate": 0.03, "scale_learning_rate": 0.002},
        tiny_pipeline(),
        Recorder(),
    )
    # Variables start at the full-precision weight, but 0.01 of a step from the grid at least. A row that this does not
    # move has a first gradient of rounding errors alone, which Adam follows like any other. A zero is on every grid.
    with torch.no_grad():
        pipeline.unet.conv_in.weight[:, 0, 0, 0] = 0
    untouched = deepcopy(pipeline.unet.conv_in)
    x, weights = learn(tmp_path / "run", pipeline, "conv_in", recorder, iterations=n, **rates, **options)
    expected = AdaRound(untouched, nearest_scale(pipeline), x, weights)
    groups = [{"params": [p], "lr": r} for p, r in zip((expected.v, expected.gain), rates.values(), strict=True)]
    adam = torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 0.5 * (1 + math.cos(math.pi * step / n)))
    start = expected.v.detach().clone()
    assert (untouched.weight.flatten(1).abs() > 6 * expected.scale).any()  # beyond the clip
    assert len(recorder.losses) == n // STEPS_A_BATCH
    for i in range(n):
        losses = expected.losses(i / n, **options)
        adam.zero_grad()
        sum(losses).backward()
        used = decay.get_last_lr()
        adam.step()
        decay.step()
        batch, last = divmod(i + 1, STEPS_A_BATCH)
        if last:
            continue
        found = recorder.losses[batch - 1]
        assert found["reconstruction_loss"] == pytest.approx(losses[0].item(), rel=1e-3)
        assert found["rounding_loss"] == pytest.approx(losses[1].item(), rel=1e-3)
        assert found["loss"] == pytest.approx(sum(losses).item(), rel=1e-3)
        assert recorder.rates[batch - 1] == pytest.approx(used, rel=1e-5)
        v, gain = recorder.variables[batch - 1]
        moved = (expected.v - start).abs().max().item()
        assert (v - expected.v).abs().max().item() < 0.01 * moved
        assert torch.allclose(gain.double(), expected.gain, atol=1e-5)
    decided = (expected.v >= 0) != (start >= 0)
    assert decided.any()  # some weights are rounded the other way


def test_the_forward_pass_takes_the_hard_decision_after_its_share_of_the_steps(
    tmp_path: Path, untouched: nn.Conv2d
) -> None:
    """Variables that stay where they start show what the loss is of: the unrounded weight, then nearest rounding."""
    pipeline, recorder = tiny_pipeline(), Recorder()
    still = {"learning_rate": 0.0, "scale_learning_rate": 0.0, "regularisation": 0.0}
    x, weights = learn(tmp_path / "run", pipeline, "conv_in", recorder, iterations=40, straight_through=0.5, **still)
    expected = AdaRound(untouched, nearest_scale(pipeline), x, weights)
    hard = expected.error((expected.v >= 0).double(), slice(0, TRAIN)).item() / expected.nearest_error
    soft = expected.error(expected.h(), slice(0, TRAIN)).item() / expected.nearest_error
    found = [losses["loss"] for losses in recorder.losses]
    assert found == pytest.approx([soft, soft, hard, hard], rel=1e-3)
    assert hard > 5 * soft


@pytest.mark.parametrize("straight_through", [0.0, 1.0])
def test_straight_through_of_0_and_1_is_always_and_never_hard(tmp_path: Path, straight_through: float) -> None:
    recorder = Recorder()
    still = {"learning_rate": 0.0, "scale_learning_rate": 0.0, "regularisation": 0.0}
    learn(
        tmp_path / "run",
        tiny_pipeline(),
        "conv_in",
        recorder,
        iterations=20,
        straight_through=straight_through,
        **still,
    )
    assert all((losses["loss"] > 0.5) == (straight_through == 0) for losses in recorder.losses)


def test_the_learning_rate_of_every_group_decays_to_zero_along_a_cosine(tmp_path: Path) -> None:
    recorder = Recorder()
    rates = {"learning_rate": 0.04, "scale_learning_rate": 0.003}
    learn(tmp_path / "run", tiny_pipeline(), "conv_in", recorder, iterations=50, **rates)
    for batch, found in enumerate(recorder.rates):
        progress = (STEPS_A_BATCH * (batch + 1) - 1) / 50
        factor = 0.5 * (1 + math.cos(math.pi * progress))
        assert found == pytest.approx([rate * factor for rate in rates.values()], rel=1e-5)
    assert recorder.rates[-1][0] < 0.01 * 0.04
    # Adam moves a variable by about its rate: the last steps move far less than the first ones.
    moves = [
        (after[0] - before[0]).abs().max().item()
        for before, after in zip(recorder.variables[:-1], recorder.variables[1:], strict=True)
    ]
    assert moves[-1] < 0.3 * moves[0]


def test_the_regulariser_is_a_mean_over_weights_however_unequal_the_layers_of_a_unit(tmp_path: Path) -> None:
    """The small layer is on the grid already, the large one as undecided as can be."""
    pipeline, recorder = tiny_pipeline(), Recorder()
    small, large = pipeline.unet.time_embedding.linear_1, pipeline.unet.time_embedding.linear_2
    on_grid = torch.tensor([1.0, -3.0, 6.0, -0.5])
    between = torch.tensor([0.74, -1.26, 6.0, 2.52])
    with torch.no_grad():
        for layer, values in ((small, on_grid), (large, between)):
            layer.weight.copy_(values.repeat(layer.weight.numel() // 4).reshape(layer.weight.shape) / 50)
    still = {"learning_rate": 0.0, "scale_learning_rate": 0.0, "warmup": 0.0, "regularisation": 0.7}
    learn(tmp_path / "run", pipeline, "time_embedding.*", recorder, iterations=20, **still)
    sizes = [v.numel() for v in recorder.variables[0][:2]]
    assert sizes == [small.weight.numel(), large.weight.numel()]
    assert sizes[1] >= 4 * sizes[0]
    for i, (losses, variables) in enumerate(zip(recorder.losses, recorder.variables, strict=True)):
        progress = (STEPS_A_BATCH * (i + 1) - 1) / 20
        beta = 2 + 9 * (1 + math.cos(math.pi * progress))
        h = [(1.2 * torch.sigmoid(v.double()) - 0.1).clamp(0, 1) for v in variables[:2]]
        terms = [1 - (2 * x - 1).abs() ** beta for x in h]
        expected = 0.7 * torch.cat([t.flatten() for t in terms]).mean().item()
        assert losses["rounding_loss"] == pytest.approx(expected, rel=1e-4)
        by_layer = 0.7 * sum(t.mean().item() for t in terms) / 2
        assert abs(by_layer - expected) > 0.1 * expected  # the two means are told apart


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("activations", [True, False])
def test_scales_are_learned_where_the_recipe_says_so_and_nowhere_else(
    tmp_path: Path, weights: bool, activations: bool
) -> None:
    pipeline, recorder = tiny_pipeline(), Recorder()
    scales = {"learn_weight_scales": weights, "learn_activation_scales": activations}
    learn(tmp_path / "run", pipeline, "conv_in", recorder, "fp8", iterations=40, learning_rate=0.03, **scales)
    weight = pipeline.unet.conv_in.weight
    sizes = [weight.numel()] + [len(weight)] * weights + [1] * activations  # V, a scale a channel, one of the input
    first, last = recorder.variables[0], recorder.variables[-1]
    assert [v.numel() for v in first] == sizes
    assert not any(torch.equal(a, b) for a, b in zip(first, last, strict=True))
