"""Calibration along the full-precision model's own sampling trajectories."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.diffusion.pipelines import denoiser_name
from fpq_lightning.diffusion.sampling import SamplerConfig, batches_of, sample, using_sampler
from fpq_lightning.graph.tree import flatten, output_leaves
from fpq_lightning.utils import distributed

_WEIGHT = "sample_weight"  # among what is recorded


def _per_sample(name: str, value: Any, batch: int) -> Any:
    """Expands the timestep, which pipelines pass as one number, to a value for each sample."""
    if name == "timestep":
        value = torch.as_tensor(value)
        return value.expand(batch) if value.ndim == 0 else value
    return value


def timestep_weights(weighting: Literal["uniform", "late", "early"], steps: int) -> Tensor:
    """How often each step of a trajectory is kept, `[steps]`, summing to 1; step 0 is pure noise."""
    position = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    weights = {"uniform": torch.ones(steps), "late": 0.5 + position, "early": 1.5 - position}[weighting]
    return weights / weights.sum()


def steps_to_keep(n: int, steps: int, weighting: Literal["uniform", "late", "early"], seed: int) -> list[list[int]]:
    """Chooses the steps of each trajectory that make a calibration set of `n` samples.

    Every trajectory gives as many samples as it has steps, so that a uniform set holds every step equally often.

    Returns:
        The steps to keep of each trajectory; with weights a step may be kept more than once.
    """
    trajectories = -(-n // steps)
    if weighting == "uniform":
        kept = [list(range(steps)) for _ in range(trajectories)]
    else:
        generator = torch.Generator().manual_seed(seed)
        draws = torch.multinomial(
            timestep_weights(weighting, steps), trajectories * steps, replacement=True, generator=generator
        )
        kept = [sorted(row.tolist()) for row in draws.reshape(trajectories, steps)]
    surplus = trajectories * steps - n
    if surplus:
        stay = np.random.default_rng(seed).permutation(steps)[: steps - surplus]
        kept[-1] = [kept[-1][i] for i in sorted(stay)]
    return kept


def output_sensitivity(scheduler: Any, arguments: tuple, options: dict[str, Any]) -> Tensor:
    """How strongly one scheduler step passes an error of the denoiser's output on to the sample, `[batch]`.

    It is a finite difference on a copy of the scheduler, so it works for any scheduler. Near the end of a trajectory
    there is little noise, so even a large relative error of its prediction changes the image little.
    """
    output, timestep, sample = arguments
    output, sample = output.float(), sample.float()  # half precision loses the difference
    options = dict(options)
    takes_generator = "generator" in inspect.signature(type(scheduler).step).parameters
    probe = output.std() * 1e-2
    stepped = []
    for shift in (0.0, probe):
        clone = copy.copy(scheduler)
        clone.__dict__ = copy.deepcopy({k: v for k, v in vars(scheduler).items() if k != "step"})
        if takes_generator:  # the same noise in both steps, should the scheduler draw any
            options["generator"] = torch.Generator("cpu").manual_seed(0)
        stepped.append(clone.step(output + shift, timestep, sample, **options))
    before, after = (s[0] if isinstance(s, tuple) else s.prev_sample for s in stepped)
    return ((after - before).flatten(1).square().mean(1).sqrt() / probe).cpu()


@torch.no_grad()
def sample_trajectories(
    pipeline: DiffusionPipeline,
    sampler: SamplerConfig,
    n: int,
    seed: int = 0,
    timesteps: Literal["uniform", "late", "early"] = "uniform",
    weighting: Literal["uniform", "sensitivity"] = "uniform",
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> CalibrationSet:
    """Samples images and records the arguments of the denoiser's calls.

    Each process of a distributed run samples a part of the trajectories; all of them return the whole set.

    Args:
        pipeline: in full precision.
        sampler: how images are sampled.
        n: number of samples to keep.
        seed: seed of the first trajectory's noise; the next ones are seed + 1, seed + 2, ...
        timesteps: how often each timestep is kept.
        weighting: equal weights, or the square of `output_sensitivity`.
        on_batch: called with the number of finished trajectories and of all trajectories.

    Returns:
        The set, on the CPU.

    Raises:
        ValueError: if `n` is not positive or the trajectories hold NaN or Inf.
    """
    if n < 1:
        raise ValueError(f"the calibration set would be empty: ask for at least 1 sample, got {n}")
    keep = steps_to_keep(n, sampler.steps, timesteps, seed)
    batches = list(batches_of(range(len(keep)), sampler.batch_size, distributed.world_size()))
    mine = range(distributed.rank(), len(batches), distributed.world_size())
    with using_sampler(pipeline, sampler), _Recorder(pipeline, keep, weighting) as recorder:
        for i in mine:
            recorder.begin(batches[i])
            sample(pipeline, sampler, [seed + trajectory for trajectory in batches[i]])
            on_batch(batches[i].stop, len(keep))
    parts = sorted(
        (part for parts in distributed.all_gather_objects(recorder.parts) for part in parts), key=lambda part: part[0]
    )
    inputs = {name: torch.cat([part[name] for _, part in parts]) for name in parts[0][1]}
    weight = inputs.pop(_WEIGHT, None)
    if not inputs:
        raise ValueError(
            f"{type(pipeline).__name__} does not call its denoiser before the steps of its scheduler: such pipelines "
            "cannot be calibrated"
        )
    if weight is None:
        weight = torch.ones(n)
    for name, value in {**inputs, "sensitivity": weight}.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(
                f"the full-precision model gives NaN or Inf along its trajectories ({name}): it cannot be calibrated"
            )
    # Shuffled, so that any part of the set is representative of all trajectories and steps.
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(weight)))
    inputs = {name: value[order] for name, value in inputs.items()}
    constants = distributed.broadcast_from_rank0(recorder.constants)
    return CalibrationSet(inputs, (weight / weight.mean())[order], constants)


@dataclass
class _Call:
    """One call of the denoiser: its arguments by path, the number of guidance passes in its batch, and its output."""

    arguments: dict[str, Any]
    passes: int
    output: Tensor


class _Recorder:
    """Records the arguments of the denoiser's calls while a pipeline samples.

    With guidance a step has several passes, either in one batch or in separate calls. Each step of a trajectory gives
    one sample, from its passes in turn.
    """

    def __init__(self, pipeline: DiffusionPipeline, keep: list[list[int]], weighting: str) -> None:
        self.scheduler = pipeline.scheduler
        self.denoiser = getattr(pipeline, denoiser_name(pipeline))
        self.signature = inspect.signature(type(self.denoiser).forward)
        self.keep = keep
        self.weighting = weighting
        self.parts: list[tuple[int, dict[str, Tensor]]] = []  # by the first trajectory of each batch
        self.constants: dict[str, Any] = {}
        self._batch = range(0)
        self._collected: dict[str, list[Tensor]] = {}
        self._calls: list[_Call] = []  # of this step
        self._step = 0

    def begin(self, batch: range) -> None:
        """Starts the next batch of trajectories."""
        self._finish()
        self._batch, self._step, self._collected, self._calls = batch, 0, {}, []

    def _finish(self) -> None:
        if len(self._batch):
            part = {name: torch.cat(values) for name, values in self._collected.items()}
            self.parts.append((self._batch.start, part))

    def __enter__(self) -> _Recorder:
        self._handle = self.denoiser.register_forward_hook(self._record, with_kwargs=True)
        self._scheduler_step = self.scheduler.step
        self.scheduler.step = self._measured_step
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()
        vars(self.scheduler).pop("step", None)
        self._finish()

    def _record(self, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        bound = dict(self.signature.bind(module, *args, **kwargs).arguments)
        bound.pop("self")
        first = next((value for value in bound.values() if isinstance(value, Tensor) and value.ndim > 1), None)
        n = len(self._batch)
        if first is None or len(first) % n:
            size = 0 if first is None else len(first)
            raise ValueError(
                f"{type(module).__name__} is called with a batch of {size} for {n} images: such pipelines cannot be "
                "calibrated"
            )
        arguments = {
            path: _per_sample(path, value, len(first))
            for name, value in bound.items()
            for path, value in flatten(name, value)
        }
        self._calls.append(_Call(arguments, len(first) // n, output_leaves(output)[0].detach()))

    def _measured_step(self, *args: Any, **kwargs: Any) -> Any:
        self._collect(args, kwargs)
        self._calls = []
        self._step += 1
        return self._scheduler_step(*args, **kwargs)

    def _collect(self, args: tuple, kwargs: dict[str, Any]) -> None:
        n = len(self._batch)
        outputs = [output for call in self._calls for output in call.output.chunk(call.passes)]
        kept = [row for row, t in enumerate(self._batch) for _ in range(self.keep[t].count(self._step))]
        if not outputs or not kept:
            return
        chosen = [(self._batch[row] + self._step) % len(outputs) for row in kept]
        # The passes of a step lie one after the other, whether in one call or in several.
        rows = torch.tensor([p * n + row for row, p in zip(kept, chosen, strict=True)])
        for path, value in self._calls[0].arguments.items():
            values = [call.arguments[path] for call in self._calls]
            if all(_is_batched(v, call.passes * n) for v, call in zip(values, self._calls, strict=True)):
                every = values[0] if len(values) == 1 else torch.cat(values)
                self._collected.setdefault(path, []).append(every[rows.to(every.device)].cpu())
            else:
                self.constants[path] = value.cpu() if isinstance(value, Tensor) else value
        if self.weighting == "sensitivity":
            shares = guidance_shares(outputs, args[0])
            sensitivity = output_sensitivity(self.scheduler, args, kwargs)
            self._collected.setdefault(_WEIGHT, []).append((sensitivity[kept] * shares[chosen]).square())


def _is_batched(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == n


def guidance_shares(outputs: Sequence[Tensor], combined: Tensor) -> Tensor:
    """The absolute weights with which the guidance passes are combined, `[passes]`.

    Classifier-free guidance adds the passes up with weights 1 - g and g. Least squares finds the weights, so any
    guidance scheme works.

    Args:
        outputs: the denoiser's output for each pass, `[n, channels, ...]`.
        combined: the combination that the scheduler is given; it lacks the last channels if these predict a variance.
    """
    if len(outputs) == 1:
        return torch.ones(1)
    columns = torch.stack([x[:, : combined.shape[1]].flatten().double().cpu() for x in outputs], dim=1)
    if columns.shape[0] != combined.numel():
        return torch.ones(len(outputs))
    gram = columns.T @ columns
    return (torch.linalg.pinv(gram) @ columns.T @ combined.flatten().double().cpu()).abs().float()
