"""Low-bit weights with operands of half precision: what is saved is memory traffic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fpq_lightning.kernels import ops

if TYPE_CHECKING:
    from fpq_lightning.nn.packed import PackedLayer

WIDTH = 4
"""Bits of the codes that are decoded within a product; with six and eight that gains nothing (docs/benchmarks.md)."""
MAX_ROWS = 64
"""Rows of the input up to which it is done."""


def fits(layer: PackedLayer) -> bool:
    """Whether the products of a layer can decode its weight as they go."""
    return (
        isinstance(layer, nn.Linear)
        and len(layer.weights) > 0
        and all(w.format.bits == WIDTH and w.offset is None and w.scale.shape[1] == 1 for w in layer.weights)
    )


def run(layer: PackedLayer, x: Tensor) -> Tensor:
    """The layer on few rows `x`, float16 or bfloat16 `[..., in]`; a product for each part of the input, summed."""
    rows = layer.quantize_input(x, layer.inputs).reshape(-1, x.shape[-1])
    bias: Tensor | None = layer.bias
    total: Tensor | None = None
    for weight, part in zip(layer.weights, rows.split(layer.splits, dim=1), strict=True):
        out = ops.weight_gemm(part.contiguous(), weight.bytes, weight.format, weight.scale, bias)
        total, bias = out if total is None else total + out, None
    return total.reshape(*x.shape[:-1], layer.shape[0])  # type: ignore[union-attr]
