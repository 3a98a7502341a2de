"""What the units of a network are called with and give in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fpq_lightning.graph.chain import parts_of
from fpq_lightning.graph.units import Unit
from fpq_lightning.utils.peak_memory import forget_peak, peak_since

_GLIMPSED = 4096  # values of a tensor, at most
_COMPARED = 2**16  # values of a tensor, about


class UnitCalls:
    """Calls of units; of what changes its shape from pass to pass only some values are kept.

    Args:
        units: of a network.
        device: the compute device.
        other: a pass with another number of samples: a tensor that has its shape there keeps its values here. Without
            it no tensor does.

    Attributes:
        given: paths of the network's inputs by the ids of leaves of `inputs` that are one.
        rows: of leaves without their values some columns, `[rows, columns]`, the dimension that grows first, by id.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device, other: UnitCalls | None = None) -> None:
        self.given: dict[int, str] = {}
        self.rows: dict[int, Tensor] = {}
        self._units = units
        self._device = device
        self._other = other
        self._shapes: dict[tuple[nn.Module, str], list[Any]] = {}
        self._inputs: dict[nn.Module, tuple[tuple, dict]] = {}
        self._glimpses: dict[nn.Module, Any] = {}
        self._outputs: dict[nn.Module, Any] = {}
        self._bytes: dict[nn.Module, int] = {}

    @torch.no_grad()
    def run(self, model: nn.Module, inputs: Mapping[str, Any], named: Mapping[str, Tensor]) -> None:
        """Runs the network.

        Args:
            model: the network.
            inputs: its keyword arguments.
            named: tensors among them by their paths, for `given`.

        Raises:
            ValueError: if a unit is not called.
        """
        start = 0
        # A network may drop its inputs on the way; as `named` holds them, no later tensor gets the id of one.
        paths = {id(x): path for path, x in named.items()}

        def enter(part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal start
            # As they come in: a unit may put more into a list, or change a tensor.
            self._inputs[part] = self._kept(part, "inputs", (args, kwargs), paths)
            self._glimpses[part] = tree_map(glimpse, (args, kwargs))
            if self._device.type == "cuda":
                start = forget_peak(self._device)

        def leave(part: nn.Module, args: Any, output: Any) -> None:
            if self._device.type == "cuda":
                self._bytes[part] = peak_since(self._device) - start
            self._outputs[part] = self._kept(part, "outputs", output, {})

        with ExitStack() as stack:
            for part in (part for unit in self._units for part in parts_of(unit.module)):
                stack.callback(part.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(part.register_forward_hook(leave).remove)
            model(**inputs)
        for unit in self._units:
            if any(part not in self._outputs for part in parts_of(unit.module)):
                raise not_called(unit)

    def _kept(self, part: nn.Module, kind: str, tree: Any, paths: Mapping[int, str]) -> Any:
        leaves, spec = tree_flatten(tree)
        self._shapes[part, kind] = [x.shape if isinstance(x, Tensor) else None for x in leaves]
        others = None if self._other is None else self._other._shapes.get((part, kind))
        kept = []
        for i, leaf in enumerate(leaves):
            other = others[i] if others is not None and i < len(others) else None
            if isinstance(leaf, Tensor) and (others is None or leaf.shape != other):
                path, unchanged = paths.get(id(leaf)), not leaf._version
                whole, leaf = leaf, leaf.new_zeros(()).expand(leaf.shape)
                if other is not None and len(other) == leaf.ndim:
                    self.rows[id(leaf)] = _some_columns(whole, other)
                if path is not None and unchanged:  # what the network has changed in place is no longer its input
                    self.given[id(leaf)] = path
            kept.append(leaf)
        return tree_unflatten(kept, spec)

    @property
    def inputs(self) -> list[tuple[tuple, dict]]:
        """Positional and keyword arguments of each unit."""
        return [self._inputs[parts_of(unit.module)[0]] for unit in self._units]

    @property
    def glimpses(self) -> list[Any]:
        """A `glimpse` of each argument of each unit."""
        return [self._glimpses[parts_of(unit.module)[0]] for unit in self._units]

    @property
    def outputs(self) -> list[Any]:
        """What each unit gives; a tuple if it has several parts."""
        found = [tuple(self._outputs[part] for part in parts_of(unit.module)) for unit in self._units]
        return [outputs if len(outputs) > 1 else outputs[0] for outputs in found]

    @property
    def bytes(self) -> list[int]:
        """That the pass of each unit took beyond its inputs; 0 where that is not known."""
        return [max(self._bytes.get(part, 0) for part in parts_of(unit.module)) for unit in self._units]


def _some_columns(leaf: Tensor, other: torch.Size) -> Tensor:
    """Some columns of a tensor whose first dimension that has another size in another shape comes first."""
    grown = next(d for d, size in enumerate(other) if size != leaf.shape[d])
    rows = leaf.movedim(grown, 0).flatten(1) if leaf.ndim > 1 else leaf[:, None]
    most = max(len(rows), other[grown])  # so that both passes keep the same columns
    return rows[:, :: max(1, most * rows.shape[1] // _COMPARED)].clone()


def glimpse(leaf: Any) -> Any:
    """Some of the values of a tensor; anything else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    values = leaf.detach().flatten()
    return values[:: len(values) // _GLIMPSED + 1].to(torch.promote_types(leaf.dtype, torch.float32), copy=True)


def not_called(unit: Unit) -> ValueError:
    """The error of a unit that does not run."""
    return ValueError(f"{unit.name} is not called for some of the samples: exclude its layers with recipe.exclude")
