"""Calibration along the full-precision model's own sampling trajectories."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.calibration.collector import Batches, Collector
from fpq_lightning.calibration.look_ahead import look_ahead
from fpq_lightning.calibration.recorder import Call, Recorder
from fpq_lightning.diffusion.denoisers import find_denoisers
from fpq_lightning.diffusion.sampling import SamplerConfig, generate, using_sampler
from fpq_lightning.utils import distributed


@torch.no_grad()
def sample_trajectories(
    pipeline: DiffusionPipeline,
    sampler: SamplerConfig,
    n: int,
    seed: int = 0,
    timesteps: Literal["uniform", "late", "early"] = "uniform",
    weighting: Literal["uniform", "sensitivity"] = "uniform",
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    on_plan: Callable[[str], None] = lambda text: None,
) -> CalibrationSet:
    """`sample_calibration_sets` of a pipeline with one denoiser."""
    (found,) = sample_calibration_sets(
        pipeline, find_denoisers(pipeline), sampler, n, seed, timesteps, weighting, on_batch, on_plan
    ).values()
    return found


@torch.no_grad()
def sample_calibration_sets(
    pipeline: DiffusionPipeline,
    denoisers: Mapping[str, nn.Module],
    sampler: SamplerConfig,
    n: int,
    seed: int = 0,
    timesteps: Literal["uniform", "late", "early"] = "uniform",
    weighting: Literal["uniform", "sensitivity"] = "uniform",
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    on_plan: Callable[[str], None] = lambda text: None,
    required: bool = True,
) -> dict[str, CalibrationSet]:
    """Samples images and records the arguments of the calls of all denoisers.

    A call gives one sample for each image, from its guidance passes in turn. Each process of a distributed run samples
    a part of the trajectories; all of them return the whole sets. There are as many trajectories as the denoiser needs
    that is called least.

    Args:
        pipeline: in full precision.
        denoisers: of the pipeline, by name.
        sampler: how images are sampled.
        n: number of samples to keep of each denoiser.
        seed: seed of the first trajectory's noise; the next ones are seed + 1, seed + 2, ...
        timesteps: how often each call of a trajectory is kept.
        weighting: equal weights, or the square of `output_sensitivity`.
        on_batch: called with the number of finished trajectories and of all trajectories.
        on_plan: called on the first process with what will be sampled, in words: for each denoiser before sampling,
            and once more for one that turns out to be called more or less often.
        required: whether every denoiser must be called; else one that never is gets a warning, and no set.

    Returns:
        The set of each denoiser, on the CPU.

    Raises:
        ValueError: if `n` is not positive, the trajectories hold NaN or Inf, a denoiser is never called, or the calls
            cannot be recorded.
    """
    if n < 1:
        raise ValueError(f"the calibration set would be empty: ask for at least 1 sample, got {n}")
    with using_sampler(pipeline, sampler):
        plans = look_ahead(pipeline, denoisers, sampler, seed, n, on_plan, required)
        denoisers = {name: denoisers[name] for name in plans}
        collectors = {name: Collector(plan, n, timesteps, seed % 2**64) for name, plan in plans.items()}
        batches = Batches(list(collectors.values()), sampler.batch_size, n, on_plan)

        def take(calls: dict[str, list[Call]], scheduler: Any) -> None:
            for name, some in calls.items():
                collectors[name].take(some)

        with Recorder(pipeline, denoisers, take, measures=weighting == "sensitivity") as recorder:
            for batch in batches:
                recorder.images = len(batch)
                generate(pipeline, sampler, [seed + trajectory for trajectory in batch])
                recorder.finish()
                for collector in collectors.values():
                    collector.end_batch()
                on_batch(min(batch.stop, batches.trajectories), batches.trajectories)
        changed = {name: recorder.guest_processors(name) for name in plans}
        for name, guests in changed.items():
            if guests and distributed.rank() == 0:
                warnings.warn(
                    f"{type(pipeline).__name__} gives {plans[name].network} other attention processors while it "
                    f"samples ({', '.join(guests)}): all of its guidance passes are calibrated with its own attention",
                    stacklevel=3,
                )
        return {
            name: collector.calibration_set(denoisers[name], as_called=not changed[name])
            for name, collector in collectors.items()
        }
