"""Closed-form rounding of a unit: its layers in stages, each from what the quantized stages before it give."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fpq_lightning.calibration.replay import NetworkReplay
from fpq_lightning.nn.calibrated import LayerQuantization, QuantizedLayer, input_of, running
from fpq_lightning.quantization.closed_form import Solution, problems_of, search_formats, solve
from fpq_lightning.quantization.moments import Moments
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.reconstruction.places import PLACES, at_places
from fpq_lightning.reconstruction.share import share
from fpq_lightning.utils import distributed
from fpq_lightning.utils.tf32 import using_tf32

_PROBED = 4  # samples that show how the layers depend on each other


class _Seen(Exception):  # noqa: N818
    """Ends a call of the unit once the inputs of a stage are known."""


@dataclass
class _Readers:
    """Layers that read the same inputs in the same way, and so share their moments.

    Attributes:
        layers: by name.
        calls: how often each runs in a call of the unit.
        part: of their input channels, that is solved apart from the others; None is all of them.
    """

    layers: dict[str, QuantizedLayer]
    calls: int
    part: int | None = None

    @property
    def first(self) -> QuantizedLayer:
        """One of the layers."""
        return next(iter(self.layers.values()))

    @property
    def parts(self) -> slice:
        """The parts of the weight that are solved."""
        return slice(None) if self.part is None else slice(self.part, self.part + 1)

    @property
    def columns(self) -> list[int]:
        """Columns of these parts."""
        return self._columns[self.parts]

    @property
    def run(self) -> slice:
        """Where they lie among the inputs of a row."""
        start = 0 if self.part is None else sum(self._columns[: self.part])
        return slice(start, start + sum(self.columns))

    @property
    def _columns(self) -> list[int]:
        return [n * self.first.weight[0, 0].numel() for n in self.first.splits]

    @property
    def shape(self) -> tuple[int, int]:
        """Groups, and inputs of each row of the weight."""
        return 1 if self.first.convolution is None else self.first.groups, sum(self.columns)

    @property
    def bytes(self) -> int:
        """That the moments take, of what is learned from and of what is held out."""
        return 2 * Moments.size(*self.shape)

    def within(self, budget: int) -> list[_Readers]:
        """These, or each part apart where all take more than a number of bytes.

        What the parts have in common is left out then, as if their inputs were not correlated.
        """
        several = range(len(self.first.splits))
        if self.bytes <= budget or len(several) == 1:
            return [self]
        return [replace(self, part=part) for part in several]


@torch.no_grad()
def solve_unit(
    replay: NetworkReplay, layers: dict[str, QuantizedLayer], rows: Tensor, held_out: Tensor, recipe: Recipe
) -> None:
    """Gives the layers of the current unit the variant ``closed_form``.

    Each layer sees what the quantized layers before it give, and so makes up for their errors and for those of its own
    quantized input. The layers of a stage are spread over the processes of a run. A layer without usable statistics,
    or whose moments take more than the store's budget, keeps nearest rounding, and a warning says so.

    Args:
        replay: at the unit; it keeps the reference inputs.
        layers: of the unit, with the variant ``nearest``.
        rows: samples of this process to learn from.
        held_out: samples of this process that decide how much targets are damped.
        recipe: candidate formats, and whether biases are corrected.
    """
    for layer in layers.values():
        layer.variants["closed_form"] = layer.variants["nearest"].copy()
    budget = replay.store.budgets["device"]
    stages = _stages(replay, {name: layer for name, layer in layers.items() if layer.variants["nearest"].weights})
    stages = [[part for readers in stage for part in readers.within(budget)] for stage in stages]
    reference = _Reference(replay, [readers for stage in stages for readers in stage], (rows, held_out))
    for stage in stages:
        for batch in _within_budget(stage, budget):
            _solve_together(replay, batch, rows, held_out, recipe, reference)


def _solve_together(
    replay: NetworkReplay,
    stage: list[_Readers],
    rows: Tensor,
    held_out: Tensor,
    recipe: Recipe,
    reference: _Reference,
) -> None:
    moments, others = (_moments(replay, stage, of, reference) for of in (rows, held_out))
    for readers, found in zip(stage, moments, strict=True):
        if not found.are_usable:
            _warn_of_nearest(readers, "no finite statistics of their inputs")
    usable = [group for group in zip(stage, moments, others, strict=True) if group[1].are_usable]
    layers = {name: layer for readers, *_ in usable for name, layer in readers.layers.items()}
    by_size = sorted(layers, key=lambda name: -layers[name].weight.numel())
    mine = by_size[distributed.rank() :: distributed.world_size()]
    solved: dict[str, LayerQuantization] = {}
    for readers, found, other in usable:
        own = {name: layer for name, layer in readers.layers.items() if name in mine}
        judging = other if other.are_usable else None
        for name, quantization in _solve(replace(readers, layers=own), found, judging, recipe).items():
            # At once, as another part of the same layer may follow.
            layers[name].variants["closed_form"] = solved[name] = quantization
    for name, quantization in share(solved, replay.store.device).items():
        layers[name].variants["closed_form"] = quantization


def _warn_of_nearest(readers: _Readers, reason: str) -> None:
    warnings.warn(f"{', '.join(readers.layers)}: {reason}, so rounded to nearest", stacklevel=4)


# --- the order of the layers ---------------------------------------------------------------------------------------


def _stages(replay: NetworkReplay, layers: dict[str, QuantizedLayer]) -> list[list[_Readers]]:
    """The layers in stages: what a layer reads depends on earlier stages alone.

    A layer that does not run for the first samples, such as an expert, comes last.
    """
    inputs = _probe(replay, layers)
    grouped: dict[str, _Readers] = {}
    for name, seen in inputs.items():
        layer = layers[name]
        quantizers = [q.to_state() for q in layer.variants["nearest"].inputs]
        kind = layer.convolution, layer.weight.shape[1:], tuple(layer.splits), layer.bias is None
        reads = (*map(id, seen), *kind, _plain(quantizers))
        grouped.setdefault(str(reads), _Readers({}, len(seen))).layers[name] = layer
    readers = list(grouped.values())
    level = [0] * len(readers)
    for i, source in enumerate(readers):  # in the order of their first calls
        changed = _probe(replay, layers, source.layers)
        for k in range(i + 1, len(readers)):
            name = next(iter(readers[k].layers))
            if not _equal(inputs[name], changed.get(name, [])):
                level[k] = max(level[k], level[i] + 1)
    last = [_Readers({name: layer}, 1) for name, layer in layers.items() if name not in inputs]
    stages = [[r for r, own in zip(readers, level, strict=True) if own == n] for n in range(max(level, default=-1) + 1)]
    names = [[(list(r.layers), r.calls) for r in stage] for stage in [*stages, last] if stage]
    agreed = distributed.broadcast_from_rank0(names)
    return [[_Readers({name: layers[name] for name in found}, calls) for found, calls in stage] for stage in agreed]


def _probe(
    replay: NetworkReplay, layers: Mapping[str, QuantizedLayer], changed: Mapping[str, QuantizedLayer] | None = None
) -> dict[str, list[Tensor]]:
    """The inputs of layers in a call of the unit, in which some layers may give something else."""
    seen: dict[str, list[Tensor]] = {}  # the inputs are kept, so that none takes the place of another

    def keep(name: str) -> Any:
        return lambda _, args, kwargs: seen.setdefault(name, []).append(input_of(args, kwargs))

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(keep(name), with_kwargs=True).remove)
        for layer in (changed or {}).values():
            stack.callback(layer.register_forward_hook(lambda _, args, output: 1.5 * output + 1).remove)
        stack.enter_context(running(replay.unit.module, "full_precision"))
        replay.call(replay.inputs(next(replay.chunks(torch.arange(replay.n)))[:_PROBED]))
    return seen


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def _plain(quantizers: list[dict[str, Any]]) -> list[Any]:
    return [[x.tolist() if isinstance(x, Tensor) else x for x in state.values()] for state in quantizers]


def _within_budget(stage: list[_Readers], budget: int) -> Iterator[list[_Readers]]:
    """A stage in parts whose moments fit a number of bytes."""
    part: list[_Readers] = []
    used = 0
    for readers in stage:
        size = readers.bytes
        if size > budget:
            _warn_of_nearest(readers, f"moments of {size / 2**30:.1f} GiB are more than data.store_budget")
            continue
        if used + size > budget:
            yield part
            part, used = [], 0
        part.append(readers)
        used += size
    if part:
        yield part


# --- moments -------------------------------------------------------------------------------------------------------


class _Reference:
    """What layers read in the full-precision network, which does not change while they are solved.

    One pass of the unit keeps it for all stages, at the places that the moments see. Where that takes more than half of
    the store's budget, each stage has a pass of its own.

    Args:
        replay: at the unit.
        readers: all of them.
        parts: samples of this process, in parts that are asked for as they are.
    """

    def __init__(self, replay: NetworkReplay, readers: list[_Readers], parts: tuple[Tensor, ...]) -> None:
        self.replay = replay
        self._known: dict[int, dict[int, list[_Input]]] = {}  # by the first sample of a chunk, and the readers
        each = sum(r.calls * r.shape[0] * r.shape[1] * r.first.weight.element_size() for r in readers)
        if each * PLACES * sum(map(len, parts)) <= replay.store.budgets["device"] // 2:
            with running(replay.unit.module, "full_precision"):
                for chunk in (chunk for rows in parts for chunk in replay.chunks(rows)):
                    self._known[int(chunk[0])] = self._read(readers, chunk)

    def of(self, stage: list[_Readers], chunk: Tensor) -> list[list[_Input]]:
        """The inputs of the calls of each of some readers."""
        found = self._known.get(int(chunk[0]))
        if found is None:
            with running(self.replay.unit.module, "full_precision"):
                found = self._read(stage, chunk)
        return [found[id(readers)] for readers in stage]

    def _read(self, stage: list[_Readers], chunk: Tensor) -> dict[int, list[_Input]]:
        seen = _inputs(self.replay, stage, self.replay.reference_inputs(chunk))
        return {
            id(readers): [_Input(tuple(x.shape), _some(readers, x, chunk)) for x in calls]
            for readers, calls in zip(stage, seen, strict=True)
        }


@dataclass
class _Input:
    """An input of a layer at the places that the moments see.

    Attributes:
        shape: of the whole input.
        places: of `at_places`.
    """

    shape: tuple[int, ...]
    places: Tensor


def _some(readers: _Readers, x: Tensor, chunk: Tensor) -> Tensor:
    """An input at places that are the same on both paths."""
    return at_places(readers.first, x, chunk)[..., readers.run] if x.numel() else x


def _moments(replay: NetworkReplay, stage: list[_Readers], rows: Tensor, reference: _Reference) -> list[Moments]:
    """Moments of what each of some layers reads, over the samples of all processes."""
    found = [Moments.zeros(*readers.shape, replay.store.device) for readers in stage]
    with running(replay.unit.module, "closed_form"):  # once, since it makes the layers decode their weights anew
        for chunk in replay.chunks(rows):
            quantized = _inputs(replay, stage, replay.inputs(chunk))
            weights = replay.weights(chunk)
            for readers, moments, *calls in zip(stage, found, reference.of(stage, chunk), quantized, strict=True):
                for full, other in zip(*calls, strict=False):
                    _add(moments, readers, full, other, weights, chunk)
    for moments in found:
        moments.sum_over_ranks()
    return found


def _inputs(replay: NetworkReplay, stage: list[_Readers], inputs: Any) -> list[list[Tensor]]:
    """What the layers of a stage read in a call of the unit, which ends with the last of them."""
    with _collecting(stage) as seen:
        replay.call(inputs)
    return seen


@contextmanager
def _collecting(stage: list[_Readers]) -> Iterator[list[list[Tensor]]]:
    seen: list[list[Tensor]] = [[] for _ in stage]

    def keep(i: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            seen[i].append(input_of(args, kwargs))
            if all(len(inputs) >= readers.calls for inputs, readers in zip(seen, stage, strict=True)):
                raise _Seen

        return hook

    with ExitStack() as stack:
        for i, readers in enumerate(stage):
            stack.callback(readers.first.register_forward_pre_hook(keep(i), with_kwargs=True).remove)
        stack.enter_context(suppress(_Seen))
        yield seen


@using_tf32(False)
def _add(moments: Moments, readers: _Readers, full: _Input, other: Tensor, weights: Tensor, chunk: Tensor) -> None:
    """Adds the inputs of one call on both paths.

    Args:
        moments: to add to.
        readers: of them.
        full: its full-precision input.
        other: its input in the quantized network.
        weights: of the samples.
        chunk: the samples.
    """
    if not other.numel():  # an expert that is not chosen may be called without tokens
        return
    layer = readers.first
    y = _some(readers, layer.quantize_input(other, layer.variants["closed_form"].inputs), chunk)
    # An expert that was given other tokens makes up for rounding alone.
    x = full.places if full.shape == tuple(other.shape) else _some(readers, other, chunk)
    # Layers that see another leading dimension than the samples weigh them alike if it is no multiple. All places count
    # alike, in whichever call.
    folded, rest = divmod(len(x), len(weights))
    each = weights.new_ones(len(x)) if rest else weights.repeat_interleave(folded)
    moments.add(x.flatten(0, 1), y.flatten(0, 1), each.repeat_interleave(x.shape[1]))


# --- a layer -------------------------------------------------------------------------------------------------------


@using_tf32(False)
def _solve(
    readers: _Readers, moments: Moments, held_out: Moments | None, recipe: Recipe
) -> dict[str, LayerQuantization]:
    """The quantization in closed form of layers that read the same: formats, scales, codes and biases."""
    if not readers.layers:
        return {}
    columns, bias = readers.columns, readers.first.bias
    weights = [layer.weight.detach().float().flatten(1)[:, readers.run] for layer in readers.layers.values()]
    corrects = bias is not None and recipe.correct_biases  # all of them have one, or none
    found = {}
    problems = problems_of(weights, moments, columns, centred=corrects, held_out=held_out)
    for (name, layer), weight, problem in zip(readers.layers.items(), weights, problems, strict=True):
        quantizers = list(layer.variants["nearest"].weights)[readers.parts]
        if recipe.weights.objective == "output":
            quantizers = search_formats(problem, weight, recipe.weight_formats(), layer.granularity)
        solution = solve(problem, weight, quantizers)
        found[name] = _quantization(layer, solution, readers)
        if layer.bias is not None and corrects:
            before = layer.variants["closed_form"].bias
            shift = moments.mean_shift(weight, solution.values)
            found[name].set_bias((layer.bias if before is None else before).detach() + shift)
    return found


def _quantization(layer: QuantizedLayer, solution: Solution, readers: _Readers) -> LayerQuantization:
    """The quantization of a layer with what was solved of it; the rest as it was."""

    def rows(values: Tensor) -> list[Tensor]:
        return [layer.granularity.rows(part.contiguous()) for part in values.split(readers.columns, dim=1)]

    before = layer.variants["closed_form"]
    weights, parts = list(before.weights), readers.parts
    weights[parts] = solution.quantizers
    solved = [q.encode(r) for q, r in zip(weights[parts], rows(solution.values), strict=True)]
    found = LayerQuantization(weights, before.inputs)
    found.codes, found.unrounded = solved, rows(solution.unrounded)
    if readers.part is not None:
        whole = layer.weight_rows()
        codes = before.codes or [q.encode(r) for q, r in zip(before.weights, whole, strict=True)]
        unrounded = before.unrounded or whole
        codes[parts], unrounded[parts] = found.codes, found.unrounded
        found.codes, found.unrounded = codes, unrounded
    return found
