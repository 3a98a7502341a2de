"""What the units of a network are called with and give in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fpq_lightning.graph.chain import parts_of
from fpq_lightning.graph.units import Unit
from fpq_lightning.utils.peak_memory import forget_peak, peak_since


class UnitCalls:
    """Calls of units, without the values of what changes its shape from pass to pass.

    Args:
        units: of a network.
        device: the compute device.
        other: a pass with another number of samples: a tensor that has its shape there keeps its values here. Without
            it no tensor does.

    Attributes:
        inputs: positional and keyword arguments of each unit.
        outputs: of each unit; a tuple if it has several parts.
        given: paths of the network's inputs by the ids of leaves of `inputs` that are one.
        bytes: that the pass of each unit took beyond its inputs; 0 where that is not known.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device, other: UnitCalls | None = None) -> None:
        self.given: dict[int, str] = {}
        self._parts = [list(parts_of(unit.module)) for unit in units]
        self._device = device
        self._other = other
        self._shapes: dict[nn.Module, list[Any]] = {}
        self._calls: dict[nn.Module, tuple[tuple[tuple, dict], Any]] = {}
        self._bytes: dict[nn.Module, int] = {}

    @torch.no_grad()
    def run(self, model: nn.Module, inputs: Mapping[str, Any], named: Mapping[int, str] | None = None) -> None:
        """Runs the network.

        Args:
            model: the network.
            inputs: its keyword arguments.
            named: paths of inputs by their ids, for `given`.
        """
        start = 0

        def before(part: nn.Module, args: Any) -> None:
            nonlocal start
            start = forget_peak(self._device)

        def after(part: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if self._device.type == "cuda":
                self._bytes[part] = peak_since(self._device) - start
            self._keep(part, ((args, kwargs), output), named or {})

        with ExitStack() as stack:
            for part in (part for parts in self._parts for part in parts):
                if self._device.type == "cuda":
                    stack.callback(part.register_forward_pre_hook(before).remove)
                stack.callback(part.register_forward_hook(after, with_kwargs=True).remove)
            model(**inputs)

    def _keep(self, part: nn.Module, call: Any, named: Mapping[int, str]) -> None:
        leaves, spec = tree_flatten(call)
        shapes = self._shapes[part] = [x.shape if isinstance(x, Tensor) else None for x in leaves]
        others = shapes if self._other is None else self._other._shapes[part]
        kept = []
        for i, leaf in enumerate(leaves):
            path = named.get(id(leaf))
            if isinstance(leaf, Tensor) and (self._other is None or shapes[i : i + 1] != others[i : i + 1]):
                unchanged = not leaf._version  # what the network has changed in place is no longer its input
                leaf = leaf.new_zeros(()).expand(leaf.shape)
                if path is not None and unchanged:
                    self.given[id(leaf)] = path
            kept.append(leaf)
        self._calls[part] = tree_unflatten(kept, spec)

    @property
    def inputs(self) -> list[tuple[tuple, dict]]:
        return [self._calls[parts[0]][0] for parts in self._parts]

    @property
    def outputs(self) -> list[Any]:
        found = [tuple(self._calls[part][1] for part in parts) for parts in self._parts]
        return [outputs if len(outputs) > 1 else outputs[0] for outputs in found]

    @property
    def bytes(self) -> list[int]:
        return [max(self._bytes.get(part, 0) for part in parts) for parts in self._parts]
