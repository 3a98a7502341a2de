"""What a calibration will take: time, memory and disk, before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fpq_lightning.calibration.replay import NetworkReplay
from fpq_lightning.calibration.shards import Shard
from fpq_lightning.calibration.trajectories import count_calls, sample_trajectories
from fpq_lightning.diffusion.pipelines import denoiser_name
from fpq_lightning.diffusion.sampling import SamplerConfig, shortened
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.graph.units import discover_units
from fpq_lightning.nn.calibrated import is_quantizable
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.training.datamodule import CalibrationDataModule
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

    def lines(self) -> list[str]:
        """For the terminal."""
        seconds = (self.sampling_seconds, self.calibration_seconds, self.evaluation_seconds)
        sampling, calibration, evaluation = (_duration(s) for s in seconds)
        beyond = max(0, self.store_bytes - self.store_budget)
        spilled = f", {format_size(beyond)} of them beyond data.store_budget" if beyond else ""
        return [
            f"estimated time: {_duration(sum(seconds))} (calibration set {sampling}, calibration {calibration}, "
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


def estimate_run(
    pipeline: DiffusionPipeline,
    recipe: Recipe,
    data: CalibrationDataModule,
    sampler: SamplerConfig,
    evaluation: EvaluationConfig,
    device: torch.device,
    world_size: int = 1,
) -> Estimate:
    """Samples two trajectories of two steps, traces the model and times one pass.

    Args:
        pipeline: in full precision, ready to run on the device.
        recipe: of the run.
        data: of the run.
        sampler: of the run.
        evaluation: of the run.
        device: the compute device.
        world_size: processes.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline)).eval()
    probe = sample_trajectories(pipeline, shortened(pipeline, sampler, batch_size=2), n=4)
    micro_batch = min(data.micro_batch, 32)
    alike = probe.largest_group()
    rows = alike[torch.arange(micro_batch) % len(alike)]
    forward = _seconds_per_sample(denoiser, probe.batch(rows, device), micro_batch, device)
    plan = discover_units(denoiser, recipe.include, recipe.exclude, recipe.units == "layer")
    units = find_units(denoiser, plan, probe, device).units
    replay = NetworkReplay(
        denoiser, units, probe, data.make_store(device), micro_batch, recipe.quantized_inputs, recipe.solves
    )
    # Of the first process, which has no fewer samples than any other.
    shard = Shard(min(recipe.rounding.batch_size, data.n_train_of(data.n_samples)), 0, world_size)
    store_bytes = replay.rehearse(len(shard.owned(data.n_samples)))

    parameters = sum(unit.parameters for unit in units)
    rounding = recipe.rounding
    iterations = rounding.iterations if rounding.learned and recipe.weight_formats() else 0
    optimised = sum(bool(unit.layers) for unit in units)
    images = evaluation.n_images * count_calls(pipeline, sampler) * (2 + 2 * _PASSES["quantized"])
    calibration = (
        (_SEARCH_SECONDS[device.type] + recipe.solves * _SOLVE_SECONDS[device.type]) * parameters
        + (_PASSES["capture"] + recipe.solves * _PASSES["closed_form"]) * data.n_samples * forward
        + iterations * _PASSES["learning"] * rounding.batch_size * forward
    ) / world_size + iterations * optimised * _STEP_SECONDS[device.type]
    leaves = [leaf for values in probe.inputs.values() for leaf in tree_leaves(values[0]) if isinstance(leaf, Tensor)]
    per_sample = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    model_bytes = sum(_bytes(m) for m in pipeline.components.values() if isinstance(m, nn.Module))
    largest = max(unit.parameters for unit in units)
    layers = [m for m in denoiser.modules() if is_quantizable(m)]
    return Estimate(
        sampling_seconds=data.n_samples * forward * 1.2 / world_size,
        calibration_seconds=calibration,
        evaluation_seconds=images * forward / world_size,
        model_bytes=model_bytes,
        store_bytes=store_bytes,
        store_budget=replay.store.budgets["device"],
        # A checkpoint, the one before and the one being written: a byte a weight, and three float32 values for each
        # weight of the unit in work.
        disk_bytes=data.n_samples * per_sample + model_bytes + 3 * (parameters + 12 * largest) + 512 * len(layers),
    )
