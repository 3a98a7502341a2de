"""What a calibration will take: time, memory and disk, before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.calibration.look_ahead import count_calls
from fpq_lightning.calibration.replay import NetworkReplay
from fpq_lightning.calibration.shards import Shard
from fpq_lightning.calibration.trajectories import sample_calibration_sets
from fpq_lightning.diffusion.sampling import SamplerConfig, shortened
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.nn.calibrated import is_quantizable
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.training.datamodule import CalibrationDataModule
from fpq_lightning.training.denoisers import Denoiser, make_denoisers
from fpq_lightning.training.units import find_units

# Measured on the embedded model and cifar10-ddpm (docs/benchmarks.md), by type of device.
_STEP_SECONDS = {"cpu": 2e-3, "cuda": 1.2e-3}  # of an optimisation step, whatever its unit
_SEARCH_SECONDS = {"cpu": 1e-6, "cuda": 1e-7}  # of a weight
_SOLVE_SECONDS = {"cpu": 5e-6, "cuda": 1e-7}  # of a weight in closed form
_PASSES = {"capture": 3.0, "closed_form": 4.0, "learning": 3.0, "quantized": 1.8}  # cost of a sample in forward passes


@dataclass
class Estimate:
    """What a run will take, on each process where they differ.

    Attributes:
        sampling_seconds: of the calibration set.
        calibration_seconds: of capture, search and learning.
        evaluation_seconds: of sampling images.
        model_bytes: of the pipeline.
        store_bytes: the most that captured activations take at once.
        store_budget: of the compute device.
        disk_bytes: of calibration set, checkpoints and the quantized pipeline, without activations.
    """

    sampling_seconds: float
    calibration_seconds: float
    evaluation_seconds: float
    model_bytes: int
    store_bytes: int
    store_budget: int
    disk_bytes: int

    @property
    def seconds(self) -> float:
        """Of the run."""
        return self.sampling_seconds + self.calibration_seconds + self.evaluation_seconds

    def lines(self) -> list[str]:
        """For the terminal."""
        parts = (self.sampling_seconds, self.calibration_seconds, self.evaluation_seconds)
        sampling, calibration, evaluation = map(_duration, parts)
        beyond = max(0, self.store_bytes - self.store_budget)
        spilled = f", {format_size(beyond)} of them beyond data.store_budget" if beyond else ""
        return [
            f"estimated time: {_duration(self.seconds)} (calibration set {sampling}, calibration {calibration}, "
            f"images {evaluation}); a rough guess",
            f"estimated memory: weights {format_size(self.model_bytes)}, captured activations "
            f"{format_size(self.store_bytes)}{spilled}; a pass needs more",
            f"estimated disk: {format_size(self.disk_bytes)}",
        ]


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else (f"{seconds / 3600:.1f} h")
    )


def format_size(n: float) -> str:
    """Bytes in a unit that leaves a few digits."""
    for unit in ("bytes", "KiB", "MiB"):
        if n < 1000:
            return f"{n:.{int(0 < n < 10 and unit != 'bytes')}f} {unit}"
        n /= 2**10
    return f"{n:.1f} GiB"


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


@torch.no_grad()
def _seconds_per_sample(denoiser: nn.Module, inputs: dict[str, Any], n: int, device: torch.device) -> float:
    """Time of a forward pass, after one to warm up."""
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        denoiser(**inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


@dataclass
class _Cost:
    """What one denoiser takes.

    Attributes:
        forward: seconds of a pass for one sample.
        calls: for an image.
        store_bytes: the most that its captured activations take at once.
        sample_bytes: of a sample of its calibration set.
        units: parameters of each of its units.
        learned: how many of them have layers to quantize.
        layers: that could be quantized.
    """

    forward: float
    calls: int
    store_bytes: int
    sample_bytes: int
    units: list[int]
    learned: int
    layers: int


def _cost(
    denoiser: Denoiser, probe: CalibrationSet, calls: int, data: CalibrationDataModule, device: torch.device, n: int,
    batch: int,
) -> _Cost:  # fmt: skip
    """Traces a denoiser and times a pass of a batch; n is the number of samples of this process."""
    alike = probe.largest_group()
    rows = alike[torch.arange(batch) % len(alike)]
    forward = _seconds_per_sample(denoiser.network, probe.batch(rows, device), batch, device)
    units = find_units(denoiser.network, denoiser.candidates, probe, device).units
    recipe = denoiser.recipe
    replay = NetworkReplay(
        denoiser.network, units, probe, data.make_store(device), data.micro_batch, recipe.quantized_inputs,
        recipe.solves,
    )  # fmt: skip
    leaves = [leaf for values in probe.inputs.values() for leaf in tree_leaves(values[0]) if isinstance(leaf, Tensor)]
    return _Cost(
        forward,
        calls,
        replay.rehearse(n),
        sum(leaf.numel() * leaf.element_size() for leaf in leaves),
        [unit.parameters for unit in units],
        sum(bool(unit.layers) for unit in units),
        sum(is_quantizable(m) for m in denoiser.network.modules()),
    )


def estimate_run(
    pipeline: DiffusionPipeline,
    recipe: Recipe,
    data: CalibrationDataModule,
    sampler: SamplerConfig,
    evaluation: EvaluationConfig,
    device: torch.device,
    world_size: int = 1,
) -> Estimate:
    """Samples two trajectories of a few steps, traces each denoiser and times one pass of it.

    Args:
        pipeline: in full precision, ready to run on the device.
        recipe: of the run.
        data: of the run.
        sampler: of the run.
        evaluation: of the run.
        device: the compute device.
        world_size: processes.
    """
    denoisers = make_denoisers(pipeline, recipe)
    networks = {denoiser.name: denoiser.network for denoiser in denoisers}
    calls = count_calls(pipeline, networks, sampler)
    networks = {name: network for name, network in networks.items() if name in calls}
    short = shortened(pipeline, sampler, batch_size=2)
    while len(networks) > 1 and count_calls(pipeline, networks, short).keys() != calls.keys():
        short = replace(short, steps=2 * (short.steps or 1))  # one is called in later steps
    probes = sample_calibration_sets(pipeline, networks, short, n=4)
    # Of the first process, which has no fewer samples than any other.
    shard = Shard(min(recipe.rounding.batch_size, data.n_train_of(data.n_samples)), 0, world_size)
    n = len(shard.owned(data.n_samples))
    costs = [
        _cost(denoiser, probes[denoiser.name], calls[denoiser.name], data, device, n, sampler.batch_size)
        for denoiser in denoisers
        if denoiser.name in probes
    ]
    parameters = sum(sum(cost.units) for cost in costs)
    rounding = recipe.rounding
    iterations = rounding.iterations if rounding.learned and recipe.weight_formats() else 0
    passes = (
        (_PASSES["capture"] + recipe.solves * _PASSES["closed_form"]) * data.n_samples
        + iterations * _PASSES["learning"] * rounding.batch_size
    )  # fmt: skip
    forward = sum(cost.forward for cost in costs)
    weights = (_SEARCH_SECONDS[device.type] + recipe.solves * _SOLVE_SECONDS[device.type]) * parameters
    steps = iterations * sum(cost.learned for cost in costs)
    image = sum(cost.calls * cost.forward for cost in costs)
    trajectories = data.n_samples / min(calls.values())  # as many as the denoiser needs that is called least
    model_bytes = sum(_bytes(m) for m in pipeline.components.values() if isinstance(m, nn.Module))
    largest = max(size for cost in costs for size in cost.units)
    return Estimate(
        sampling_seconds=trajectories * image * 1.2 / world_size,
        calibration_seconds=(weights + passes * forward) / world_size + steps * _STEP_SECONDS[device.type],
        evaluation_seconds=evaluation.n_images * (2 + 2 * _PASSES["quantized"]) * image / world_size,
        model_bytes=model_bytes,
        store_bytes=max(cost.store_bytes for cost in costs),
        store_budget=data.make_store(device).budgets["device"],
        # A checkpoint, the one before and the one being written: a byte a weight, and three float32 values for each
        # weight of the unit in work.
        disk_bytes=data.n_samples * sum(cost.sample_bytes for cost in costs)
        + model_bytes
        + 3 * (parameters + 12 * largest)
        + 512 * sum(cost.layers for cost in costs),
    )
