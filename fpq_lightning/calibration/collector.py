"""The samples of a calibration set, chosen from the calls of all trajectories."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from fpq_lightning.calibration.axes import LEADING, SHARED, Axis, collapsed, images_of, joined
from fpq_lightning.calibration.calibration_set import CalibrationSet, non_finite
from fpq_lightning.calibration.look_ahead import Plan
from fpq_lightning.calibration.recorder import Call
from fpq_lightning.diffusion.sampling import batches_of
from fpq_lightning.graph.tree import cloned, output_leaves
from fpq_lightning.utils import distributed
from fpq_lightning.utils.closeness import is_close

_NOT_FINITE = "the full-precision model gives NaN or Inf along its trajectories ({}): it cannot be calibrated"


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


class Batches:
    """The batches of trajectories of this process, all processes together making what every denoiser needs."""

    def __init__(
        self, collectors: Sequence[Collector], batch_size: int, n: int, on_plan: Callable[[str], None]
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


class Collector:
    """Keeps the samples of a denoiser's calibration set from its calls in all batches.

    How many calls a trajectory has is known once the first batch is done, so all of its calls are kept till then.
    """

    def __init__(self, plan: Plan, n: int, timesteps: Literal["uniform", "late", "early"], seed: int) -> None:
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
        self._ends_early = False  # whether all calls of the last step were left out
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

    def take(self, calls: Sequence[Call]) -> None:
        """The calls of the batch that is sampled since the last step of a scheduler."""
        self._ends_early = not sum(map(self._take, calls))

    def _take(self, call: Call) -> bool:
        """Whether a call is one that the set may hold."""
        structure, leaves = collapsed(call.arguments, self.plan.axes)
        if structure != self.plan.structure:
            self._leave_out(leaves)
            return False
        if not call.finite:
            raise ValueError(_NOT_FINITE.format("its output"))
        shared = {path: leaf for path, leaf in leaves.items() if path not in self.plan.axes}
        self._of_first = self._of_first or shared
        if lost := next((path for path, leaf in leaves.items() if not self._is_placed(path, leaf)), None):
            raise ValueError(
                f"{self.plan.network} is called with another {lost} later along a trajectory than at first, and how it "
                "belongs to the images of a batch cannot be told: such pipelines cannot be calibrated"
            )
        self._varied |= {path for path, leaf in shared.items() if not _equal(leaf, self._of_first[path])}
        if self._calls is None:
            self._first.append((_on_host(leaves), call.sensitivity))
            self.ends, self.images = [*self.ends[:1], call], len(self.batch)
        else:
            self._collect(leaves, call.sensitivity, self._seen)
        self._seen += 1
        return True

    def _is_placed(self, path: str, leaf: Any) -> bool:
        """Whether it is known how an argument belongs to the images of the batch, from what the first call said."""
        axis = self.plan.axes.get(path)
        if axis is None:
            is_new = isinstance(leaf, Tensor) and not isinstance(self._of_first[path], Tensor)
            return not (is_new and leaf.numel() > 1)
        rows = len(self.batch) * axis.folded
        if axis.holds_items():
            return isinstance(leaf, (list, tuple)) and len(leaf) % rows == 0
        return not isinstance(leaf, Tensor) or (leaf.ndim > axis.dim and leaf.shape[axis.dim] % rows == 0)

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
        if self._ends_early:
            raise ValueError(
                f"{self.plan.network} is called with other arguments at the end of a trajectory than at its beginning "
                f"({'; '.join(sorted(self._other))}): such pipelines cannot be calibrated"
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

    def calibration_set(self, denoiser: Any, as_called: bool = True) -> CalibrationSet:
        """All samples, in the order of `_shuffled`.

        Args:
            denoiser: the network.
            as_called: whether it is taken to be what it was within the pipeline.
        """
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
                    shape = () if axes[path].folded == 1 else (axes[path].folded,)
                    values = [torch.as_tensor(value).reshape(()).expand(shape) for value in values]
            inputs[path] = _stacked(values)
        if broken := non_finite({**inputs, **constants}):
            raise ValueError(_NOT_FINITE.format(broken))
        self._check_repeatable(denoiser, as_called)
        nested = {path: axis for path, axis in axes.items() if axis != LEADING}
        if not (weight.any() and weight.isfinite().all()):  # a network that gives zeros; what cannot be measured
            weight = torch.ones(self.n)
        weight = (weight / weight.mean()).clamp(min=torch.finfo(weight.dtype).tiny)  # on disk, zeros are damage
        return CalibrationSet(inputs, weight[order], constants, nested, self.plan.structure)

    def _check_repeatable(self, denoiser: Any, as_called: bool) -> None:
        """Finds out that a network does not give for its arguments what it gave within the pipeline.

        Raises:
            ValueError: if it gives something else each time.
        """
        if not self.ends:
            return
        last = self.ends[-1]
        again, once_more = (output_leaves(denoiser(**tree_map(cloned, last.arguments))) for _ in range(2))
        if not _alike(again, once_more):
            raise ValueError(
                f"{self.plan.network} gives different outputs for the same arguments: it keeps a state from call to "
                "call, such as a cache, or draws random numbers; turn that off before quantization"
            )
        if as_called and not _alike(again, last.output) and distributed.rank() == 0:
            warnings.warn(
                f"{self.plan.network} gives something else for the arguments of its last call than it gave within the "
                "pipeline, which may change it while it samples: it is calibrated as it is outside of the pipeline",
                stacklevel=2,
            )

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
            arguments = tree_map(lambda name: cloned(given[name]), self.plan.structure)
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


def _alike(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether outputs are the same but for the order of sums, and NaN where the others have it."""
    if [x.shape for x in some] != [x.shape for x in others]:
        return False
    pairs = ((a.float().nan_to_num(), b.float().nan_to_num()) for a, b in zip(some, others, strict=True))
    return all(is_close(a, b, 1e-3) for a, b in pairs)


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
    return tree_map(cloned, value)


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
