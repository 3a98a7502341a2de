"""Calibration along the full-precision model's own sampling trajectories."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from fpq_lightning.calibration.axes import LEADING, SHARED, Axis, find_axes, images_of, joined
from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.calibration.recorder import Call, Enough, Recorder
from fpq_lightning.diffusion.pipelines import denoiser_name
from fpq_lightning.diffusion.sampling import SamplerConfig, batches_of, generate, using_sampler, warn_of_long_prompts
from fpq_lightning.graph.tree import output_leaves
from fpq_lightning.utils import distributed


def timestep_weights(weighting: Literal["uniform", "late", "early"], steps: int) -> Tensor:
    """How often each call of a trajectory is kept, `[steps]`, summing to 1; the first sees pure noise."""
    position = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    weights = {"uniform": torch.ones(steps), "late": 0.5 + position, "early": 1.5 - position}[weighting]
    return weights / weights.sum()


def steps_to_keep(n: int, steps: int, weighting: Literal["uniform", "late", "early"], seed: int) -> list[list[int]]:
    """Chooses the calls of each trajectory that make a calibration set of `n` samples.

    Every trajectory gives as many samples as it has calls, so that a uniform set holds every call equally often.

    Returns:
        The calls to keep of each trajectory; with weights a call may be kept more than once.
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
    """Samples images and records the arguments of the denoiser's calls.

    A call gives one sample for each image, from its guidance passes in turn. Each process of a distributed run samples
    a part of the trajectories; all of them return the whole set.

    Args:
        pipeline: in full precision.
        sampler: how images are sampled.
        n: number of samples to keep.
        seed: seed of the first trajectory's noise; the next ones are seed + 1, seed + 2, ...
        timesteps: how often each call of a trajectory is kept.
        weighting: equal weights, or the square of `output_sensitivity`.
        on_batch: called with the number of finished trajectories and of all trajectories.
        on_plan: called once, on the first process, with what will be sampled, in words.

    Returns:
        The set, on the CPU.

    Raises:
        ValueError: if `n` is not positive, the trajectories hold NaN or Inf, or the calls cannot be recorded.
    """
    if n < 1:
        raise ValueError(f"the calibration set would be empty: ask for at least 1 sample, got {n}")
    with using_sampler(pipeline, sampler):
        plan = _look_ahead(pipeline, sampler, seed, n, on_plan)
        collector = _Collector(plan, n, timesteps, seed % 2**64)
        with Recorder(pipeline, collector.take, measures=weighting == "sensitivity") as recorder:
            for batch in collector.batches(plan.batch_size):
                recorder.images = len(batch)
                generate(pipeline, sampler, [seed + trajectory for trajectory in batch])
                recorder.finish()
                collector.end_batch()
                on_batch(min(batch.stop, collector.trajectories), collector.trajectories)
        return collector.calibration_set(getattr(pipeline, denoiser_name(pipeline)))


# --- what a trajectory is ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What is known before sampling.

    Attributes:
        network: name of the denoiser's class.
        axes: where images lie in its arguments.
        structure: of the first call's arguments, with the path of each leaf in its place.
        calls: of a trajectory, as the scheduler says.
        batch_size: images that are sampled at once.
    """

    network: str
    axes: dict[str, Axis]
    structure: Any
    calls: int
    batch_size: int


def _look_ahead(
    pipeline: DiffusionPipeline, sampler: SamplerConfig, seed: int, n: int, on_plan: Callable[[str], None]
) -> _Plan:
    """Calls the pipeline for the first step of some images, and says what will be calibrated."""
    images = min(2, sampler.batch_size)
    prompts = sampler.prompts_of([seed])
    small, large = (_first_step(pipeline, sampler, seed, k, prompts) for k in (images, images + 1))
    network = type(getattr(pipeline, denoiser_name(pipeline))).__name__
    if not small or len(small) != len(large):
        raise ValueError(
            f"{type(pipeline).__name__} calls its denoiser {len(small)} times in the first step of {images} images and "
            f"{len(large)} times in that of {images + 1}: such pipelines cannot be calibrated"
        )
    axes: dict[str, Axis] = {}
    for a, b in zip(small, large, strict=True):
        axes = find_axes(network, a.arguments, b.arguments, images) | axes
    if not axes:
        raise ValueError(
            f"{network} is called with nothing that grows with the images: such pipelines cannot be calibrated"
        )
    structure, _ = collapsed(small[0].arguments, axes)
    calls = _steps_of(pipeline, sampler) * len(small)
    prompts = sampler.prompts_of(range(seed, seed + -(-n // calls))) or []
    if distributed.rank() == 0:
        on_plan(f"{network} with {n} samples along {_described(pipeline, sampler, calls)}")
        warn_of_long_prompts(pipeline, prompts)
    alone = sampler.batch_size > 1 and _lengths_differ(pipeline, sampler, seed, prompts, axes)
    return _Plan(network, axes, structure, calls, 1 if alone else sampler.batch_size)


def count_calls(pipeline: DiffusionPipeline, sampler: SamplerConfig) -> int:
    """How often the denoiser is called for an image, by what the scheduler says; takes the first step of one image."""
    with torch.no_grad(), using_sampler(pipeline, sampler):
        calls = _first_step(pipeline, sampler, 0, 1, sampler.prompts_of([0]))
        return _steps_of(pipeline, sampler) * max(1, len(calls))


def _steps_of(pipeline: DiffusionPipeline, sampler: SamplerConfig) -> int:
    """Steps of a trajectory that has begun."""
    timesteps = getattr(pipeline.scheduler, "timesteps", None)
    return sampler.steps or 1 if timesteps is None or not len(timesteps) else len(timesteps)


def _described(pipeline: DiffusionPipeline, sampler: SamplerConfig, calls: int) -> str:
    """What is sampled, in words."""
    timesteps = getattr(pipeline.scheduler, "timesteps", None)
    span = "" if timesteps is None or not len(timesteps) else f", timesteps {timesteps[0]:.4g} to {timesteps[-1]:.4g}"
    guidance = "guidance of the pipeline" if sampler.guidance_scale is None else f"guidance {sampler.guidance_scale:g}"
    return f"{type(pipeline.scheduler).__name__}: {calls} calls a trajectory{span}, {guidance}"


def _first_step(
    pipeline: DiffusionPipeline, sampler: SamplerConfig, seed: int, images: int, prompts: list[str] | None
) -> list[Call]:
    """The calls of the denoiser before the first step of the scheduler; all images have one prompt."""
    calls: list[Call] = []
    alike = None if prompts is None else prompts[:1] * images
    with Recorder(pipeline, calls.append, one_step=True), suppress(Enough):
        generate(pipeline, sampler, range(seed, seed + images), alike)
    return calls


def _lengths_differ(
    pipeline: DiffusionPipeline, sampler: SamplerConfig, seed: int, prompts: list[str], axes: Mapping[str, Axis]
) -> bool:
    """Whether the length of a prompt shows in the shape of an argument: a batch would pad it to its longest."""
    if len(set(prompts)) < 2:
        return False
    ends = min(prompts, key=len), max(prompts, key=len)
    short, long = (_first_step(pipeline, sampler, seed, 1, [prompt])[0].arguments for prompt in ends)
    shapes = [
        {path: [x.shape for x in tree_flatten(leaf)[0] if isinstance(x, Tensor)] for path, leaf in leaves.items()}
        for _, leaves in (collapsed(arguments, axes) for arguments in (short, long))
    ]
    return shapes[0] != shapes[1]


def collapsed(arguments: Any, axes: Mapping[str, Axis]) -> tuple[Any, dict[str, Any]]:
    """A tree of arguments with paths for leaves, and the leaves; a list with an item for each image is one leaf."""
    leaves: dict[str, Any] = {}

    def walk(path: str, node: Any) -> Any:
        if not (path in axes and axes[path].kind == "list"):
            if isinstance(node, Mapping):
                return {key: walk(f"{path}/{key}" if path else str(key), child) for key, child in node.items()}
            if isinstance(node, (list, tuple)):
                children = [walk(f"{path}/{i}", child) for i, child in enumerate(node)]
                return tuple(children) if isinstance(node, tuple) else children
        leaves[path] = node
        return path

    return walk("", arguments), leaves


# --- collecting ----------------------------------------------------------------------------------------------------


class _Collector:
    """Keeps the samples of a calibration set from the calls of all batches.

    How many calls a trajectory has is known once the first batch is done, so all of its calls are kept till then.
    """

    def __init__(self, plan: _Plan, n: int, timesteps: Literal["uniform", "late", "early"], seed: int) -> None:
        self.plan, self.n, self.timesteps, self.seed = plan, n, timesteps, seed
        self.keep: list[list[int]] = []
        self.ends: list[Call] = []  # the first and the last call of the first batch
        self.images = 0  # of it
        self._calls: int | None = None
        self._taken: list[tuple[int, dict[str, Any], float]] = []  # first trajectory of its batch, leaves, weight
        self._first: list[tuple[dict[str, Any], Tensor | None]] = []  # leaves and sensitivity of its calls
        self._batch = range(0)
        self._seen = 0  # calls of this batch
        self._other: set[str] = set()
        self._of_first: dict[str, Any] = {}  # what all images of the first call have in common
        self._varied: set[str] = set()  # what differs between calls

    def batches(self, size: int) -> Any:
        """The batches of trajectories of this process, all processes together making what is needed."""
        rank, world = distributed.rank(), distributed.world_size()
        guessed = -(-self.n // self.plan.calls)
        planned = list(batches_of(range(guessed), size, world))
        first = planned[:world]
        if rank < len(first):
            self._batch = first[rank]
            yield self._batch
        self._calls = distributed.broadcast_from_rank0(self._calls)
        self.keep = steps_to_keep(self.n, cast(int, self._calls), self.timesteps, self.seed)
        for index, (leaves, sensitivity) in enumerate(self._first):
            self._collect(leaves, sensitivity, index)
        self._first = []
        rest = planned[world:]
        if len(self.keep) != guessed:
            rest = list(batches_of(range(first[-1].stop, len(self.keep)), size, world))
        for batch in rest[rank::world]:
            self._batch = batch
            yield batch

    @property
    def trajectories(self) -> int:
        """How many there are; a guess before the first batch is done."""
        return len(self.keep) or -(-self.n // (self._calls or self.plan.calls))

    def take(self, call: Call) -> None:
        """A call of the batch that is sampled."""
        structure, leaves = collapsed(call.arguments, self.plan.axes)
        if structure != self.plan.structure:
            self._leave_out(leaves)
            return
        shared = {path: leaf for path, leaf in leaves.items() if path not in self.plan.axes}
        self._of_first = self._of_first or shared
        self._varied |= {path for path, leaf in shared.items() if not _equal(leaf, self._of_first[path])}
        if self._calls is None:
            self._first.append((_on_host(leaves), call.sensitivity))
            self.ends, self.images = [*self.ends[:1], call], len(self._batch)
        else:
            self._collect(leaves, call.sensitivity, self._seen)
        self._seen += 1

    def _leave_out(self, leaves: Mapping[str, Any]) -> None:
        known = set(tree_flatten(self.plan.structure)[0])
        other = ", ".join(sorted(set(leaves) ^ known)) or "other containers"
        if other not in self._other:
            self._other.add(other)
            warnings.warn(
                f"some calls of {self.plan.network} have other arguments than the first ({other}): they are left out "
                "of the calibration set",
                stacklevel=2,
            )

    def end_batch(self) -> None:
        """The batch is done."""
        if self._calls is None:
            self._calls = self._seen
        if self._seen != self._calls:
            raise ValueError(
                f"{self.plan.network} is called {self._calls} times along one trajectory and {self._seen} times along "
                "another: such pipelines cannot be calibrated"
            )
        self._seen = 0

    def _collect(self, leaves: dict[str, Any], sensitivity: Tensor | None, index: int) -> None:
        batch = self._batch
        kept = [(i, t) for i, t in enumerate(batch) if t < len(self.keep) for _ in range(self.keep[t].count(index))]
        if not kept:
            return
        leaves = _on_host(leaves)  # one transfer for each, not one for each image
        split = {
            path: images_of(leaf, self.plan.axes[path], len(batch))
            for path, leaf in leaves.items()
            if path in self.plan.axes
        }
        shared = {path: leaf for path, leaf in leaves.items() if path not in split}
        passes = max(map(len, split.values()))
        for image, trajectory in kept:
            chosen = (trajectory + index) % passes
            own = {path: _kept(values[chosen % len(values)][image]) for path, values in split.items()}
            weight = 1.0
            if sensitivity is not None:
                weight = sensitivity[chosen % len(sensitivity), image].item() ** 2
            self._taken.append((batch.start, own | shared, weight))

    def calibration_set(self, denoiser: Any) -> CalibrationSet:
        """All samples, in an order that makes every part of the set representative."""
        everything = [sample for part in distributed.all_gather_objects(self._taken) for sample in part]
        everything.sort(key=lambda sample: sample[0])
        if len(everything) != self.n:
            raise ValueError(
                f"{len(everything)} samples were recorded where {self.n} were asked for: please report this"
            )
        weight = torch.tensor([sample[2] for sample in everything])
        order = np.random.default_rng(self.seed).permutation(self.n).tolist()
        axes = dict(self.plan.axes)
        inputs: dict[str, Any] = {}
        constants: dict[str, Any] = {}
        varied = set().union(*distributed.all_gather_objects(self._varied))
        for path, value in everything[0][1].items():
            if path not in axes and path not in varied:
                constants[path] = value
                continue
            values = [everything[i][1][path] for i in order]
            if path not in axes:
                axes[path] = distributed.broadcast_from_rank0(self._varying_axis(denoiser, path))
                if axes[path].kind == "dim":
                    values = [torch.as_tensor(value).reshape(()) for value in values]
            inputs[path] = _stacked(values)
        _check_finite({**inputs, "sensitivity": weight})
        nested = {path: axis for path, axis in axes.items() if axis != LEADING}
        if not weight.any():  # a network that gives zeros
            weight = torch.ones(self.n)
        return CalibrationSet(inputs, (weight / weight.mean())[order], constants, nested, self.plan.structure)

    def _varying_axis(self, denoiser: Any, path: str) -> Axis:
        """Whether an argument that changes from call to call can be given for each image.

        A network that takes one timestep for all images of a batch mostly takes one for each, too. That is tried, with
        the values of two calls in one batch: each image must get what its own value gives all of them.
        """
        if len(self.ends) < 2:
            return SHARED
        (_, others), (_, leaves) = (collapsed(call.arguments, self.plan.axes) for call in self.ends)
        values = others[path], leaves[path]
        for value in values:
            if isinstance(value, (str, bool)) or value is None or (isinstance(value, Tensor) and value.numel() != 1):
                return SHARED
        twice = dict(leaves)
        for name, axis in self.plan.axes.items():
            image = images_of(leaves[name], axis, self.images)[0][0]
            twice[name] = joined(torch.stack([image] * 2) if isinstance(image, Tensor) else [image] * 2, axis)

        def outputs(value: Any) -> list[Tensor]:
            given = {**twice, path: value}
            arguments = tree_map(lambda name: _own(given[name]), self.plan.structure)
            return [x.float() for x in output_leaves(denoiser(**arguments))]

        device = self.ends[0].output[0].device
        first, second = map(outputs, values)
        both = torch.stack([torch.as_tensor(value, device=device).reshape(()) for value in values])
        for folded in sorted({axis.folded for axis in self.plan.axes.values()}):
            try:
                found = outputs(both.repeat_interleave(folded))
            except Exception:  # whatever a network may do with what it does not expect
                continue
            if all(map(_are_halves, found, first, second)):
                return Axis("dim", 0, folded)
        return SHARED


def _own(leaf: Any) -> Any:
    """A leaf that a network may change."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _are_halves(both: Tensor, first: Tensor, second: Tensor) -> bool:
    """Whether a batch of two gives the first image of one and the second of the other."""
    half = len(first) // 2
    if both.shape != first.shape or first.shape != second.shape:
        return False
    return torch.allclose(both, torch.cat([first[:half], second[half:]]), rtol=1e-3, atol=1e-4)


def _on_host(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, value)


def _kept(value: Any) -> Any:
    """A value that does not hold on to the batch that it is of."""
    return tree_map(_own, value)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    return type(a) is type(b) and bool(a == b)


def _stacked(values: list[Any]) -> Any:
    """One tensor where values are tensors of one shape and type; of the widest floating type if there are several."""
    if not all(isinstance(v, Tensor) and v.shape == values[0].shape for v in values):
        return values
    alike = len({v.dtype for v in values}) == 1 or all(v.is_floating_point() for v in values)
    return torch.stack(values) if alike else values


def _check_finite(inputs: Mapping[str, Any]) -> None:
    for path, value in inputs.items():
        for leaf in tree_flatten(value)[0]:
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not (leaf.isfinite().all() or _is_bias(leaf)):
                raise ValueError(
                    f"the full-precision model gives NaN or Inf along its trajectories ({path}): it cannot be "
                    "calibrated"
                )


def _is_bias(leaf: Tensor) -> bool:
    """Whether it masks attention: zero, or minus infinity."""
    return bool(((leaf == 0) | (leaf == -torch.inf)).all())
