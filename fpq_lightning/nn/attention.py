"""Attention with quantized products: queries, keys, values, and the softmax output between them.

A module that calls `torch.nn.functional.scaled_dot_product_attention` becomes quantized in place: its class changes to
a subclass whose forward intercepts the call. Whoever makes it (the module, a processor, a dispatcher of backends) need
not be known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from fpq_lightning.nn.calibrated import QuantizedModule
from fpq_lightning.nn.input_quantizer import describe_quantizer
from fpq_lightning.nn.swap import SwappedModule
from fpq_lightning.quantization.quantizer import Quantizer

OPERANDS = ("query", "key", "value", "softmax")
_CHUNK = 2**26  # softmax outputs computed at once; bounds memory to a few times 256 MiB where nothing is learned
_SAMPLE = 2**20  # values of an operand that the search looks at, at most

Operand = Callable[[Tensor], Tensor]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    operands: Sequence[Operand],
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` in float32, each operand passed through a function.

    Args:
        query: `[..., heads, L, E]`.
        key: `[..., heads, S, E]`; with `enable_gqa` the heads may be fewer.
        value: `[..., heads, S, V]`; likewise.
        attn_mask: bool (True takes part) or added to the scores, broadcastable to `[..., heads, L, S]`.
        dropout_p: 0.
        is_causal: whether query i sees keys up to i only.
        scale: of the scores; ``1 / sqrt(E)`` by default.
        enable_gqa: whether query heads share key and value heads.
        operands: what query, key, value and the softmax output go through, the last one some queries at a time.

    Returns:
        `[..., heads, L, V]`, the dtype of `query`.

    Raises:
        ValueError: if there is dropout.
    """
    if dropout_p:
        raise ValueError(f"attention with dropout ({dropout_p}) cannot be quantized: exclude its module")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    kind = query.device.type
    with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):  # there is none for tensors without data
        q, k, v = (operand(x.float()) for operand, x in zip(operands, (query, key, value), strict=False))
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
        bias = _bias(attn_mask, is_causal, q, k)
        at_once = max(1, _CHUNK // (math.prod(q.shape[:-2]) * k.shape[-2]))
        parts = []
        for start in range(0, q.shape[-2], at_once):
            rows = slice(start, start + at_once)
            scores = q[..., rows, :] @ k.mT * scale
            if bias is None:
                probabilities = scores.softmax(-1)
            else:
                scores = scores + (bias if bias.shape[-2] == 1 else bias[..., rows, :])
                # A query that sees no key gets zeros, as from the fused function, and no NaN in its gradient.
                blind = scores.amax(-1, keepdim=True) == -math.inf
                probabilities = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
            parts.append(operands[3](probabilities) @ v)
        return torch.cat(parts, dim=-2).to(query.dtype)


def _bias(mask: Tensor | None, is_causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    """What is added to the scores, float32, or None."""
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)


class _Calls(TorchFunctionMode):
    """Computes the calls made within by `attention`, each with operands of its own."""

    def __init__(self, operands: Sequence[Operand], made: list[None]) -> None:
        super().__init__()
        self.operands = list(operands)
        self.made = made  # one a call; compilers do not read attributes of a mode once it is left

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        mine = self.operands[len(self.made) * len(OPERANDS) :][: len(OPERANDS)]
        self.made.append(None)
        return attention(*args, **kwargs, operands=mine) if mine else func(*args, **kwargs)


class InterceptedAttention(SwappedModule):
    """Mixin of modules whose calls of scaled dot-product attention are intercepted.

    Attributes:
        full_name: of the module in the network.
        n_calls: how often its forward calls scaled dot-product attention.
    """

    full_name: str
    n_calls: int

    def operands_in_force(self) -> Sequence[Operand]:
        """What `OPERANDS` go through, for one call after the other; empty leaves the calls as they are."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module.

        Raises:
            ValueError: if it calls attention more or less often than it did in calibration.
        """
        operands = self.operands_in_force()
        if not operands:
            return super().forward(*args, **kwargs)
        made: list[None] = []
        with _Calls(operands, made):
            output = super().forward(*args, **kwargs)
        if len(made) != self.n_calls:
            raise ValueError(
                f"{self.full_name}: it called scaled_dot_product_attention {len(made)} times, {self.n_calls} in "
                "calibration: use the attention processor and backend of the calibration"
            )
        return output


class QuantizedAttention(InterceptedAttention, QuantizedModule):
    """Mixin of modules whose attention is being calibrated; use `make_attention_quantized` to turn one into it.

    The `inputs` of its variants are the quantizers of `OPERANDS`.

    Attributes:
        observers: what the operands go through instead while they are observed.
    """

    observers: Sequence[Operand]

    def operands_in_force(self) -> Sequence[Operand]:
        quantization = self.quantization
        return self.observers or ([] if quantization is None else cast("Sequence[Operand]", quantization.inputs))


class PackedAttention(InterceptedAttention):
    """Mixin of modules with the attention of packed files; use `pack_attention` to turn one into it.

    Attributes:
        operands: the quantizers of `OPERANDS`, for one call after the other.
    """

    operands: Sequence[Quantizer]

    def operands_in_force(self) -> Sequence[Operand]:
        return cast("Sequence[Operand]", self.operands)

    def describe(self) -> list[dict[str, Any]]:
        """All of the operands that is not in their tensors: plain types, which `make_attention_empty` reads."""
        return [describe_quantizer(q) for q in self.operands]


def quantized_attention(module: nn.Module) -> dict[str, InterceptedAttention]:
    """The modules below a module whose attention is quantized, calibrated or packed, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, InterceptedAttention)}


def packed_attention(module: nn.Module) -> dict[str, PackedAttention]:
    """The modules below a module with the attention of packed files, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, PackedAttention)}


class OperandSample:
    """Every n-th value of an operand over all calls, and the extremes of each call; lets them through."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._extremes: list[Tensor] = []
        self._stride = 1
        self._seen = 0

    def __call__(self, x: Tensor) -> Tensor:
        self._values.append(x.flatten()[-self._seen % self._stride :: self._stride].clone())  # a view would keep all
        self._extremes.append(torch.stack(x.aminmax()))
        self._seen += x.numel()
        while sum(map(len, self._values)) > _SAMPLE:
            # Threes, since rows of a length that the stride divides would show the same few keys only.
            self._stride *= 3
            self._values = [torch.cat(self._values)[::3].clone()]
        return x

    @property
    def values(self) -> Tensor:
        """`[1, n]`, float32."""
        return torch.cat([*self._values, *self._extremes])[None]


@contextmanager
def observing(modules: Mapping[str, QuantizedAttention]) -> Iterator[dict[str, list[OperandSample]]]:
    """Collects what the attention of modules in mode ``full_precision`` sees: samples of `OPERANDS`, call by call."""
    found = {name: [OperandSample() for _ in range(m.n_calls * len(OPERANDS))] for name, m in modules.items()}
    for name, module in modules.items():
        module.observers = found[name]
    try:
        yield found
    finally:
        for module in modules.values():
            module.observers = ()
