"""Calibration along the full-precision model's own sampling trajectories."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from fpq_lightning.calibration.axes import LEADING, SHARED, Axis, find_axes, images_of, joined
from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.calibration.recorder import Call, Recorder
from fpq_lightning.diffusion.denoisers import find_denoisers
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
        plans = _look_ahead(pipeline, denoisers, sampler, seed, n, on_plan, required)
        denoisers = {name: denoisers[name] for name in plans}
        collectors = {name: _Collector(plan, n, timesteps, seed % 2**64) for name, plan in plans.items()}
        batches = _Batches(list(collectors.values()), sampler.batch_size, n, on_plan)

        def take(calls: dict[str, list[Call]], scheduler: Any) -> None:
            for name, some in calls.items():
                for call in some:
                    collectors[name].take(call)

        with Recorder(pipeline, denoisers, take, measures=weighting == "sensitivity") as recorder:
            for batch in batches:
                recorder.images = len(batch)
                generate(pipeline, sampler, [seed + trajectory for trajectory in batch])
                recorder.finish()
                for collector in collectors.values():
                    collector.end_batch()
                on_batch(min(batch.stop, batches.trajectories), batches.trajectories)
        return {name: collector.calibration_set(denoisers[name]) for name, collector in collectors.items()}


# --- what a trajectory is ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What is known of a denoiser before sampling.

    Attributes:
        network: its class, and its name if it is not the only one.
        axes: where images lie in its arguments.
        structure: of the first call's arguments, with the path of each leaf in its place.
        calls: of a trajectory, as the schedulers say.
        alone: whether images are sampled one by one.
    """

    network: str
    axes: dict[str, Axis]
    structure: Any
    calls: int
    alone: bool


class _Enough(Exception):  # noqa: N818
    """Ends sampling once all is known that was asked for."""


@dataclass
class _Ahead:
    """What the beginning of a trajectory says of a denoiser.

    Attributes:
        first: its calls in the first step in which it is called.
        scheduler: that makes this step.
        calls: of the whole trajectory, if it goes on as it began.
    """

    first: list[Call]
    scheduler: Any
    calls: int = 0


def _begin(
    pipeline: DiffusionPipeline,
    denoisers: Mapping[str, nn.Module],
    sampler: SamplerConfig,
    seeds: Sequence[int],
    prompts: list[str] | None,
) -> dict[str, _Ahead]:
    """Samples until every denoiser has been called, or to the end; all images have one prompt."""
    found: dict[str, _Ahead] = {}
    steps: Counter[int] = Counter()

    def on_step(calls: dict[str, list[Call]], scheduler: Any) -> None:
        scheduler = getattr(pipeline, "scheduler", None) if scheduler is None else scheduler
        steps[id(scheduler)] += 1
        left = _steps_of(scheduler, sampler) - steps[id(scheduler)]
        for name, some in calls.items():
            found.setdefault(name, _Ahead(some, scheduler)).calls += len(some)
        if len(found) == len(denoisers):
            for name, some in calls.items():
                found[name].calls += max(0, left) * len(some)
            raise _Enough

    alike = None if prompts is None else prompts[:1] * len(seeds)
    with suppress(_Enough), Recorder(pipeline, denoisers, on_step):
        generate(pipeline, sampler, seeds, alike)
    return found


def _look_ahead(
    pipeline: DiffusionPipeline,
    denoisers: Mapping[str, nn.Module],
    sampler: SamplerConfig,
    seed: int,
    n: int,
    on_plan: Callable[[str], None],
    required: bool,
) -> dict[str, _Plan]:
    """Calls the pipeline for the first steps of some images, and says what will be calibrated."""
    images = min(2, sampler.batch_size)
    prompts = sampler.prompts_of([seed])
    small, large = (_begin(pipeline, denoisers, sampler, range(seed, seed + k), prompts) for k in (images, images + 1))
    if never := [name for name in denoisers if name not in small]:
        text = f"{type(pipeline).__name__} never calls its {', '.join(never)} along a trajectory of this sampler"
        if required or not small:
            raise ValueError(f"{text}: leave it out of recipe.denoisers, or sample otherwise")
        if distributed.rank() == 0:
            warnings.warn(f"{text}: it stays in full precision", stacklevel=3)
    denoisers = {name: module for name, module in denoisers.items() if name in small}
    networks = {name: type(module).__name__ for name, module in denoisers.items()}
    if len(denoisers) > 1:
        networks = {name: f"{name} ({kind})" for name, kind in networks.items()}
    axes = {name: _axes(networks[name], small[name], large.get(name), pipeline, images) for name in denoisers}
    prompts = sampler.prompts_of(range(seed, seed + max(-(-n // ahead.calls) for ahead in small.values()))) or []
    if distributed.rank() == 0:
        for name in denoisers:
            on_plan(f"{networks[name]} with {n} samples along {_described(small[name], sampler)}")
        warn_of_long_prompts(pipeline, prompts)
    alone = sampler.batch_size > 1 and _lengths_differ(pipeline, denoisers, sampler, seed, prompts, axes)
    return {
        name: _Plan(
            networks[name], axes[name], collapsed(small[name].first[0].arguments, axes[name])[0],
            small[name].calls, alone,
        )
        for name in denoisers
    }  # fmt: skip


def _axes(
    network: str, small: _Ahead, large: _Ahead | None, pipeline: DiffusionPipeline, images: int
) -> dict[str, Axis]:
    """Where images lie in the arguments of a denoiser."""
    n_large = 0 if large is None else len(large.first)
    if large is None or len(small.first) != n_large:
        raise ValueError(
            f"{type(pipeline).__name__} calls {network} {len(small.first)} times in the first step of {images} images "
            f"and {n_large} times in that of {images + 1}: such pipelines cannot be calibrated"
        )
    axes: dict[str, Axis] = {}
    for a, b in zip(small.first, large.first, strict=True):
        axes = find_axes(network, a.arguments, b.arguments, images) | axes
    if not axes:
        raise ValueError(
            f"{network} is called with nothing that grows with the images: such pipelines cannot be calibrated"
        )
    return axes


def count_calls(
    pipeline: DiffusionPipeline, denoisers: Mapping[str, nn.Module], sampler: SamplerConfig
) -> dict[str, int]:
    """How often each denoiser is called for an image, by what the schedulers say; samples the beginning of one image.

    One that is never called is left out.
    """
    with torch.no_grad(), using_sampler(pipeline, sampler):
        found = _begin(pipeline, denoisers, sampler, [0], sampler.prompts_of([0]))
        return {name: ahead.calls for name, ahead in found.items()}


def _steps_of(scheduler: Any, sampler: SamplerConfig) -> int:
    """Steps of a trajectory that has begun."""
    timesteps = getattr(scheduler, "timesteps", None)
    return sampler.steps or 1 if timesteps is None or not len(timesteps) else len(timesteps)


def _described(ahead: _Ahead, sampler: SamplerConfig) -> str:
    """What is sampled, in words."""
    timesteps = getattr(ahead.scheduler, "timesteps", None)
    span = "" if timesteps is None or not len(timesteps) else f", timesteps {timesteps[0]:.4g} to {timesteps[-1]:.4g}"
    guidance = "guidance of the pipeline" if sampler.guidance_scale is None else f"guidance {sampler.guidance_scale:g}"
    return f"{type(ahead.scheduler).__name__}: {ahead.calls} calls a trajectory{span}, {guidance}"


def _lengths_differ(
    pipeline: DiffusionPipeline,
    denoisers: Mapping[str, nn.Module],
    sampler: SamplerConfig,
    seed: int,
    prompts: list[str],
    axes: Mapping[str, Mapping[str, Axis]],
) -> bool:
    """Whether the length of a prompt shows in the shape of an argument: a batch would pad it to its longest."""
    if len(set(prompts)) < 2:
        return False
    shapes = []
    for prompt in (min(prompts, key=len), max(prompts, key=len)):
        begun = _begin(pipeline, denoisers, sampler, [seed], [prompt])
        leaves = {name: collapsed(ahead.first[0].arguments, axes[name])[1] for name, ahead in begun.items()}
        shapes.append(tree_map(lambda leaf: leaf.shape if isinstance(leaf, Tensor) else None, leaves))
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


class _Batches:
    """The batches of trajectories of this process, all processes together making what every denoiser needs."""

    def __init__(
        self, collectors: Sequence[_Collector], batch_size: int, n: int, on_plan: Callable[[str], None]
    ) -> None:
        self.collectors, self.n, self.on_plan = collectors, n, on_plan
        self.batch_size = 1 if any(collector.plan.alone for collector in collectors) else batch_size

    @property
    def trajectories(self) -> int:
        """How many there are; a guess before the first batch is done."""
        return max(collector.trajectories for collector in self.collectors)

    def __iter__(self) -> Iterator[range]:
        rank, world = distributed.rank(), distributed.world_size()
        guessed = self.trajectories
        planned = list(batches_of(range(guessed), self.batch_size, world))
        first = planned[:world]
        yield from map(self._begun, first[rank : rank + 1])
        for collector in self.collectors:
            calls, plan = collector.choose(), collector.plan
            if len(self.collectors) > 1 and calls != plan.calls and rank == 0:
                self.on_plan(f"{plan.network}: {calls} calls a trajectory, not {plan.calls}")
        rest = planned[world:]
        if self.trajectories != guessed:
            rest = list(batches_of(range(first[-1].stop, self.trajectories), self.batch_size, world))
        yield from map(self._begun, rest[rank::world])

    def _begun(self, batch: range) -> range:
        for collector in self.collectors:
            collector.batch = batch
        return batch


class _Collector:
    """Keeps the samples of a denoiser's calibration set from its calls in all batches.

    How many calls a trajectory has is known once the first batch is done, so all of its calls are kept till then.
    """

    def __init__(self, plan: _Plan, n: int, timesteps: Literal["uniform", "late", "early"], seed: int) -> None:
        self.plan, self.n, self.timesteps, self.seed = plan, n, timesteps, seed
        self.keep: list[list[int]] = []
        self.ends: list[Call] = []  # the first and the last call of the first batch
        self.images = 0  # of it
        self.batch = range(0)  # that is sampled
        self._calls: int | None = None
        self._taken: list[tuple[int, dict[str, Any], float]] = []  # trajectory, leaves, weight
        self._first: list[tuple[dict[str, Any], Tensor | None]] = []  # leaves and sensitivity of its calls
        self._seen = 0  # calls of this batch
        self._other: set[str] = set()
        self._of_first: dict[str, Any] = {}  # what all images of the first call have in common
        self._varied: set[str] = set()  # what differs between calls

    @property
    def trajectories(self) -> int:
        """How many it needs; a guess before the first batch is done."""
        return len(self.keep) or -(-self.n // (self._calls or self.plan.calls))

    def choose(self) -> int:
        """Chooses the calls to keep, once the first batch is done, and gives how many a trajectory has."""
        self._calls = cast(int, distributed.broadcast_from_rank0(self._calls))
        self.keep = steps_to_keep(self.n, self._calls, self.timesteps, self.seed)
        for index, (leaves, sensitivity) in enumerate(self._first):
            self._collect(leaves, sensitivity, index)
        self._first = []
        return self._calls

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
            self.ends, self.images = [*self.ends[:1], call], len(self.batch)
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
        batch = self.batch
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
            self._taken.append((trajectory, own | shared, weight))

    def calibration_set(self, denoiser: Any) -> CalibrationSet:
        """All samples, in the order of `_shuffled`."""
        everything = [sample for part in distributed.all_gather_objects(self._taken) for sample in part]
        everything.sort(key=lambda sample: sample[0])
        if len(everything) != self.n:
            raise ValueError(
                f"{len(everything)} samples were recorded where {self.n} were asked for: please report this"
            )
        weight = torch.tensor([sample[2] for sample in everything])
        order = _shuffled([sample[0] for sample in everything], np.random.default_rng(self.seed))
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


def _shuffled(trajectories: Sequence[int], rng: np.random.Generator) -> list[int]:
    """An order of samples in which every part is representative and a tail is made of whole trajectories.

    What is held out for validation is a tail. It says more if nothing else of its trajectories was learned from.

    Args:
        trajectories: of each sample.
        rng: decides the order.
    """
    different = rng.permutation(sorted(set(trajectories)))
    place = {int(trajectory): i for i, trajectory in enumerate(different)}
    last = len(place) - max(1, len(place) // 4)
    order = rng.permutation(len(trajectories)).tolist()
    return sorted(order, key=lambda i: max(last - 1, place[trajectories[i]]))


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
