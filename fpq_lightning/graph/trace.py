"""What forward passes tell about the units: their order, what each is made from, and which layers read skips.

Passes that only note the calls of modules show first which candidates can be units (`settle_units`). Then one small
forward pass runs under a `TorchFunctionMode` that tags every tensor with the units whose outputs it was
made from, and every concatenation of the outputs of different units (a UNet's skip connections) with its pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fpq_lightning.graph.chain import Chain, chained
from fpq_lightning.graph.passes import Passes, ShapePasses
from fpq_lightning.graph.units import Unit, layer_count
from fpq_lightning.graph.whole import Pass, record, settle_units
from fpq_lightning.nn.calibrated import input_of, is_quantizable

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
# Operations after which a channel no longer holds what it held before.
_MIXING = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, F.pixel_shuffle, F.pixel_unshuffle,
    torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, torch.cumsum, torch.flip, torch.roll,
    Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.reshape, Tensor.view, Tensor.transpose, Tensor.permute,
    Tensor.flip, Tensor.roll, Tensor.cumsum,
}  # fmt: skip


@dataclass(frozen=True)
class _Pieces:
    dim: int
    sizes: tuple[int, ...]


class _Tracer(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.origins: dict[int, frozenset[int]] = {}
        self.pieces: dict[int, _Pieces] = {}
        self.inside_unit = False
        self._alive: list[Tensor] = []  # ids must not be used again during the pass

    def origin(self, tree: Any) -> frozenset[int]:
        found = (self.origins.get(id(x), frozenset()) for x in tree_leaves(tree) if isinstance(x, Tensor))
        return frozenset().union(*found)

    def tag(self, tree: Any, origin: frozenset[int]) -> None:
        if not origin:
            return  # weights, above all, which are not to be kept where they are moved to
        for x in tree_leaves(tree):
            if isinstance(x, Tensor):
                self.origins[id(x)] = origin
                self._alive.append(x)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        written = args[0] if func is Tensor.__setitem__ else out
        self.tag(written, self.origin((args, kwargs)))
        if not isinstance(out, Tensor):
            return out
        if func in _CONCATENATIONS and not self.inside_unit:
            tensors = args[0] if args else kwargs["tensors"]
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            origins = [self.origin(t) for t in tensors]
            if all(origins) and len(set(origins)) == len(origins) > 1:
                self.pieces[id(out)] = _Pieces(dim % out.ndim, tuple(t.shape[dim] for t in tensors))
        elif func not in _MIXING:
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            tagged = [self.pieces[id(x)] for x in inputs if id(x) in self.pieces and x.shape == out.shape]
            if tagged:
                self.pieces[id(out)] = tagged[0]
        return out


def _watched(
    model: nn.Module, inputs: Mapping[str, Any], others: Sequence[tuple[int | None, Mapping[str, Any]]]
) -> tuple[Passes, list[Pass]]:
    """Passes of a network that it can do, of shapes alone if possible, and what was seen in some."""

    def seen(passes: Passes) -> tuple[Passes, list[Pass]]:
        return passes, [record(model, passes, inputs), *(record(model, passes, more, n) for n, more in others)]

    with suppress(Exception):  # whatever a network raises that needs values
        return seen(ShapePasses(model))
    return seen(Passes(model))


def trace_units(
    model: nn.Module,
    units: list[Unit],
    inputs: Mapping[str, Any],
    others: Sequence[tuple[int | None, Mapping[str, Any]]] = (),
) -> tuple[list[Unit], dict[str, tuple]]:
    """Runs the network, settles and orders its units, and joins lone layers to the blocks whose outputs they read.

    Args:
        model: the network, in full precision.
        units: of `discover_units`; those that are left to the network get the reason.
        inputs: keyword arguments of one forward pass; a batch of one is enough.
        others: keyword arguments of further passes and the number of samples in each, which is to differ: they show
            which modules are given whole samples. None where shapes may differ otherwise, too: they show which modules
            always run.

    Returns:
        The units that ran, in execution order, with `sources` filled in and layers in execution order; and for
        every layer that reads a concatenation the sizes of its pieces.
    """
    passes, found = _watched(model, inputs, others)
    units, maybe = settle_units(model, units, found)
    maybe |= {module for one in found for module in one.calls}
    tracer = _Tracer()
    order: list[Unit] = []
    layer_order: dict[int, int] = {}
    splits: dict[str, tuple] = {}
    handles = []
    last: tuple[Any, list[int]] = (None, [])  # output of the last unit, and the versions of its tensors

    def joins(unit: Unit, args: Any, kwargs: Any) -> bool:
        before = order[-1] if order else None
        if before is None or layer_count(unit.module) > 1 or layer_count(before.module) == 1:
            return False
        if isinstance(before.module, Chain):
            return False
        chain = chained(before.module, *last, unit.module, args, kwargs)
        if chain is None:
            return False
        before.name, before.module = f"{before.name}+{unit.name}", chain
        before.layers |= unit.layers
        return True

    def enter(unit: Unit) -> Callable:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tracer.inside_unit = True
            if joins(unit, args, kwargs):
                return
            unit.sources = sorted(tracer.origin((args, kwargs)))
            order.append(unit)

        return hook

    def leave(unit: Unit) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal last
            tracer.inside_unit = False
            tracer.tag(output, frozenset([len(order) - 1]))
            last = output, [x._version for x in tree_leaves(output) if isinstance(x, Tensor)]

        return hook

    def read(name: str, module: nn.Module) -> Callable:
        def hook(runs: nn.Module, args: tuple, kwargs: dict) -> None:
            layer_order.setdefault(id(module), len(layer_order))
            x = input_of(args, kwargs)
            pieces = tracer.pieces.get(id(x))
            channel_dim = x.ndim - 1 if isinstance(module, nn.Linear) else 1
            if pieces is not None and pieces.dim == channel_dim:
                splits[name] = pieces.sizes

        return hook

    for unit in units:
        runs = passes.runs_as(unit.module)
        handles.append(runs.register_forward_pre_hook(enter(unit), with_kwargs=True))
        handles.append(runs.register_forward_hook(leave(unit)))
    for name, module in model.named_modules():
        if is_quantizable(module):
            handles.append(passes.runs_as(module).register_forward_pre_hook(read(name, module), with_kwargs=True))
    try:
        with tracer:
            passes(inputs)
    finally:
        for handle in handles:
            handle.remove()
    for unit in order:
        called = {name: layer for name, layer in unit.layers.items() if layer in maybe}
        unit.layers = dict(sorted(called.items(), key=lambda item: layer_order.get(id(item[1]), len(layer_order))))
    return order, splits
