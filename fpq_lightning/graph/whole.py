"""Which modules can be units, told by forward passes.

A unit is called once in a pass of the network, with whole samples. Candidates that are not (an embedding that is used
twice, experts that are given some of the tokens each) become part of the module around them that is. Where only the
network itself is, they are no unit: it runs them, in full precision, as part of what lies between the units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fpq_lightning.graph.passes import Passes
from fpq_lightning.graph.units import Unit, layer_count, walk

RUN_AGAIN = "layers that run more than once in a pass of the network"
PARTS_OF_SAMPLES = "layers that do not run on whole samples"

_Shape = tuple[int, ...] | None  # None for what is no tensor


@dataclass
class _Call:
    """A call of a module.

    Attributes:
        around: the modules that were running, the outermost first.
        shapes: of the leaves of its arguments and its output.
    """

    around: tuple[nn.Module, ...]
    shapes: list[_Shape]


@dataclass
class Pass:
    """The calls of all modules in a forward pass.

    Attributes:
        n: samples; None if that is not known.
        calls: of every module that ran, in order.
    """

    n: int | None
    calls: dict[nn.Module, list[_Call]]


def _shapes(tree: Any) -> list[_Shape]:
    return [tuple(x.shape) if isinstance(x, Tensor) else None for x in tree_leaves(tree)]


def record(model: nn.Module, passes: Passes, inputs: Mapping[str, Any], n: int | None = None) -> Pass:
    """Runs a network once and notes how its modules are called.

    Args:
        model: the network.
        passes: of it.
        inputs: keyword arguments of the pass.
        n: samples in it, if that is known.
    """
    found = Pass(n, {})
    running: list[tuple[nn.Module, _Call]] = []

    def enter(module: nn.Module, runs: nn.Module, args: Any, kwargs: Any) -> None:
        call = _Call(tuple(m for m, _ in running), _shapes((args, kwargs)))
        found.calls.setdefault(module, []).append(call)
        running.append((module, call))

    def leave(runs: nn.Module, args: Any, output: Any) -> None:
        running.pop()[1].shapes.extend(_shapes(output))

    handles = []
    for module in model.modules():
        runs = passes.runs_as(module)
        handles.append(runs.register_forward_pre_hook(partial(enter, module), with_kwargs=True))
        handles.append(runs.register_forward_hook(leave))
    try:
        passes(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _follows(shapes: Sequence[_Shape], sizes: Sequence[int]) -> bool:
    """Whether a leaf is the same whatever the number of samples, or one of its dimensions grows with it."""
    first = shapes[0]
    if all(shape == first for shape in shapes):
        return first is None or 0 not in first[:-1]  # no rows at all are what an expert gets that is not chosen
    known = [shape for shape in shapes if shape is not None]
    if first is None or len(known) < len(shapes) or len({len(shape) for shape in known}) > 1:
        return False
    pairs = list(zip(known, sizes, strict=True))
    return any(size > 0 and all(s[d] * sizes[0] == size * n for s, n in pairs) for d, size in enumerate(first))


class _Whole:
    """Tells which modules can be units.

    Args:
        passes: all of the network.
        units: the candidates.
    """

    def __init__(self, passes: Sequence[Pass], units: Sequence[Unit]) -> None:
        self.passes = passes
        self.units = {unit.module for unit in units}

    def calls(self, module: nn.Module) -> list[_Call]:
        """Its calls in all passes."""
        return [call for found in self.passes for call in found.calls.get(module, ())]

    def __call__(self, module: nn.Module) -> bool:
        """Whether it runs once in every pass, in no unit's call, on whole samples."""
        found = [p.calls.get(module, []) for p in self.passes]
        if any(len(calls) != 1 for calls in found) or any(self.units & {*calls[0].around} for calls in found):
            return False
        known = [(p.n, calls[0].shapes) for p, calls in zip(self.passes, found, strict=True) if p.n is not None]
        sizes, shapes = [n for n, _ in known], [s for _, s in known]
        return len({len(s) for s in shapes}) <= 1 and all(_follows(leaf, sizes) for leaf in zip(*shapes, strict=True))

    def fits(self, unit: Unit) -> bool:
        """Whether a candidate is a unit, or does not run at all."""
        return not self.calls(unit.module) or self(unit.module)

    def reason(self, module: nn.Module) -> str:
        """Why a module is no unit."""
        again = any(len(found.calls.get(module, ())) > 1 for found in self.passes)
        return RUN_AGAIN if again else PARTS_OF_SAMPLES


def settle_units(model: nn.Module, units: Sequence[Unit], passes: Sequence[Pass]) -> tuple[list[Unit], set[nn.Module]]:
    """Puts candidates that cannot be units into larger ones that can.

    Args:
        model: the network.
        units: of `discover_units`; one that is left to the network gets the reason.
        passes: of the network; those with different numbers of samples show who is given whole samples.

    Returns:
        The units; and layers that may run in other passes than these, for lists of experts hold them.
    """
    whole = _Whole(passes, units)
    settled = list(units)

    def put_into(module: nn.Module, name: str) -> None:
        inside = set(module.modules())
        parts = [unit for unit in settled if unit.module in inside]
        settled[:] = [unit for unit in settled if unit.module not in inside]
        settled.append(Unit(name, module, {n: layer for unit in parts for n, layer in unit.layers.items()}))

    def leave(unit: Unit) -> None:
        inside = set(unit.module.modules())
        for part in (part for part in units if part.module in inside):
            part.left = whole.reason(unit.module)
        settled.remove(unit)

    experts = _lists_of_experts(model, settled, whole)
    members = {member for group in experts for member in group.children() if layer_count(member) > 1}
    for name, module in walk(model, experts) if experts else ():
        inside = set(module.modules()) - {module}
        parts = {unit.module for unit in settled if unit.module in inside}
        if parts & members and len(parts) < len(settled) and whole(module):
            put_into(module, name)
    whole.units = {unit.module for unit in settled}
    names = {module: name for name, module in model.named_modules()}
    of_experts = {module for group in experts for module in group.modules()}
    for unit in list(settled):
        fits = whole.fits(unit)
        if (fits and unit.module not in of_experts) or not any(unit is other for other in settled):
            continue  # it is a unit, or part of a larger one by now
        around = _around(unit.module, {model, *of_experts}, whole, settled) if unit.layers else None
        if around is not None:
            put_into(around, names[around])
        elif not fits or not unit.layers:
            leave(unit)
    return settled, of_experts


def _lists_of_experts(model: nn.Module, units: Iterable[Unit], whole: _Whole) -> set[nn.Module]:
    """The lists most of whose members are not given whole samples, and those of whose blocks one alone runs."""
    wrong = {u.module for u in units if not whole.fits(u) and whole.reason(u.module) == PARTS_OF_SAMPLES}
    found: set[nn.Module] = set()
    for group in reversed([m for m in model.modules() if isinstance(m, nn.ModuleList)]):  # the innermost first
        running = [member for member in group.children() if whole.calls(member)]
        experts = [member for member in running if wrong & set(member.modules())]
        blocks = [block for block in group.children() if layer_count(block) > 1]
        if 2 * len(experts) > len(running) or len(set(running) & set(blocks)) == 1 < len(blocks):
            found.add(group)
        wrong -= set(group.modules())
    return found


def _around(module: nn.Module, never: set[nn.Module], whole: _Whole, units: Sequence[Unit]) -> nn.Module | None:
    """The smallest module that can be a unit, holds a module and runs around all its calls; None if there is none.

    Some are never one. One that holds all units is the network but for its name.
    """
    calls = whole.calls(module)
    for around in reversed(calls[0].around if calls else ()):
        inside = set(around.modules())
        if around not in never and module in inside and all(around in call.around for call in calls) and whole(around):
            return None if all(unit.module in inside for unit in units) else around
    return None
