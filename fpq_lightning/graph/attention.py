"""Which modules compute attention, told by one forward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fpq_lightning.graph.chain import parts_of
from fpq_lightning.graph.units import Unit, is_selected
from fpq_lightning.nn.convert import make_attention_quantized

_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_PRODUCTS = {
    torch.matmul, torch.bmm, torch.baddbmm, torch.einsum,
    Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.baddbmm,
}  # fmt: skip


class _Tracer(TorchFunctionMode):
    """Counts calls of attention by the innermost module that makes them.

    Attributes:
        calls: of `torch.nn.functional.scaled_dot_product_attention` in each forward of a module; one if all agree.
        others: names of modules with products of a softmax output, attention by another function, or dropout.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: defaultdict[str, set[int]] = defaultdict(set)
        self.others: set[str] = set()
        self._running: list[str] = []  # the innermost last
        self._made: list[int] = []  # calls of each so far
        self._probabilities: dict[int, Tensor] = {}  # kept, for ids must not be used again during the pass

    def enter(self, name: str) -> None:
        self._running.append(name)
        self._made.append(0)

    def leave(self) -> None:
        self.calls[self._running.pop()].add(self._made.pop())

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = [x for x in tree_leaves((args, kwargs)) if id(x) in self._probabilities]
        if func is F.scaled_dot_product_attention:
            self._made[-1] += 1
            if args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0):
                self.others.add(self._running[-1])
        elif func is F.multi_head_attention_forward or (read and func in _PRODUCTS):
            self.others.add(self._running[-1])
        elif func in _SOFTMAX or (read and isinstance(out, Tensor) and out.shape == read[0].shape):
            self._probabilities[id(out)] = out
        return out


def _trace(model: nn.Module, inputs: Mapping[str, Any]) -> _Tracer:
    tracer = _Tracer()
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: tracer.enter(name)))
        handles.append(module.register_forward_hook(lambda *_: tracer.leave()))
    try:
        with torch.no_grad(), tracer:
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return tracer


def quantize_attention(
    model: nn.Module, units: Sequence[Unit], inputs: Mapping[str, Any], include: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    """Makes the modules that compute attention quantized classes, and tells their units.

    Args:
        model: the network, in full precision.
        units: that run; one without layers to quantize is not calibrated, and neither is its attention.
        inputs: keyword arguments of one forward pass; a batch of one is enough.
        include: patterns, of which the name of a module must match one.
        exclude: patterns, of which it may match none.

    Returns:
        Names of the chosen modules whose attention stays in full precision all the same: they compute it in another
        way than by `torch.nn.functional.scaled_dot_product_attention` without dropout, not equally often each time,
        hold others that compute some, or lie in no calibrated unit.

    Raises:
        ValueError: if the network has no attention.
    """
    tracer = _trace(model, inputs)
    every = tracer.others | {name for name, made in tracer.calls.items() if made != {0}}
    if not every:
        raise ValueError("recipe.attention: the denoiser computes no attention; leave recipe.attention.formats out")
    modules = dict(model.named_modules())
    calibrated = [unit for unit in reversed(units) if unit.layers]  # a module that two share goes with the first
    unit_of = {part: unit for unit in calibrated for whole in parts_of(unit.module) for part in whole.modules()}
    left = []
    for name in (name for name in modules if name in every and is_selected(name, include, exclude)):
        unit, n_calls = unit_of.get(modules[name]), tracer.calls[name]
        holds_another = any(other.startswith(f"{name}.") for other in every)
        if unit is None or name in tracer.others or len(n_calls) > 1 or holds_another:
            left.append(name or type(model).__name__)
        else:
            unit.attention[name] = make_attention_quantized(modules[name], name, *n_calls)
    return left
