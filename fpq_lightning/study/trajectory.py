"""The error of quantized denoisers along the sampling trajectory."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fpq_lightning.diffusion.denoisers import quantized_denoisers
from fpq_lightning.diffusion.sampling import SamplerConfig, sample, using_sampler
from fpq_lightning.graph.tree import output_leaves
from fpq_lightning.nn.calibrated import Mode, running
from fpq_lightning.utils.tf32 import using_tf32

Call = tuple[nn.Module, tuple, dict[str, Any], Tensor]


@contextmanager
def _recording(denoisers: Collection[nn.Module]) -> Iterator[list[Call]]:
    """The denoiser, arguments and first output of every call."""
    calls: list[Call] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append((module, args, kwargs, output_leaves(output)[0].detach().clone()))

    with ExitStack() as stack:
        for denoiser in denoisers:
            stack.callback(denoiser.register_forward_hook(keep, with_kwargs=True).remove)
        yield calls


@contextmanager
def _running(denoisers: Collection[nn.Module], mode: Mode) -> Iterator[None]:
    with ExitStack() as stack:
        for denoiser in denoisers:
            stack.enter_context(running(denoiser, mode))
        yield


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).square().mean() / expected.square().mean()).item()


@torch.no_grad()
def trajectory_errors(
    pipeline: DiffusionPipeline, sampler: SamplerConfig, seeds: range, mode: Mode
) -> dict[str, list[float]]:
    """Relative mean squared error of the quantized denoisers at every step.

    Args:
        pipeline: a pipeline with quantized denoisers.
        sampler: how images are sampled.
        seeds: seeds of the trajectories, which are sampled as one batch.
        mode: the mode of its quantized layers.

    Returns:
        ``timesteps``; ``output``, the error of the denoiser's output on the full-precision model's states; and
        ``state``, the difference of the states that the sampler has reached, which includes all earlier errors.
    """
    denoisers = quantized_denoisers(pipeline).values()
    found: dict[str, list[float]] = {"timesteps": [], "output": [], "state": []}
    with using_sampler(pipeline, sampler), using_tf32(False):
        with _running(denoisers, "full_precision"), _recording(denoisers) as expected:
            sample(pipeline, sampler, seeds)
            timesteps = [float(t) for t in pipeline.scheduler.timesteps]
        with _running(denoisers, mode):
            for denoiser, args, kwargs, output in expected:
                again = output_leaves(denoiser(*args, **kwargs))[0]
                found["output"].append(_relative(again, output))
            with _recording(denoisers) as calls:
                sample(pipeline, sampler, seeds)
    for (_, args, kwargs, _), (_, others, other_kwargs, _) in zip(expected, calls, strict=True):
        found["state"].append(_relative(_state(others, other_kwargs), _state(args, kwargs)))
    calls_a_step = max(1, len(expected) // len(timesteps))
    found["timesteps"] = [t for t in timesteps for _ in range(calls_a_step)][: len(expected)]
    return found


def _state(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The noisy sample that a denoiser is called with, which is its first argument."""
    return args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor) and value.ndim > 2)
