"""E4M3 by E4M3 on tensor cores.

Only the hardware's own E4M3 can be an operand. A weight in four or six bits can, when every value of its format is one
of E4M3, too: it stays packed in memory, and its codes are translated for each call. The scales, hence a searched real
exponent bias, are applied to the sums.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fpq_lightning import kernels
from fpq_lightning.formats import Format, parse_format
from fpq_lightning.kernels import ops
from fpq_lightning.packing import unpack
from fpq_lightning.quantizers import Quantizer

if TYPE_CHECKING:
    from fpq_lightning.storage.packed import PackedLayer, PackedWeight

E4M3 = parse_format("float8_e4m3fn")
_ALIGNMENT = 16  # of rows and columns of the weight, in bytes


@lru_cache(maxsize=64)
def embeds(fmt: Format) -> bool:
    """Whether every value of a format is one of E4M3."""
    values = fmt.grid
    return bool((E4M3.quantize(values) == values).all())


def fits(layer: PackedLayer) -> bool:
    """Whether both operands of a layer are E4M3 up to scales of output channels and of rows of the input."""
    return (
        isinstance(layer, nn.Linear)
        and len(layer.weights) > 0
        and len(layer.inputs) > 0
        and all(embeds(w.format) and w.offset is None and w.scale.shape[1] == 1 for w in layer.weights)
        and all(q.format == E4M3 and q.offset is None and _by_row(q) for q in layer.inputs)
        and all(n % _ALIGNMENT == 0 for n in (layer.shape[0], *layer.splits))
    )


def _by_row(quantizer: Quantizer) -> bool:
    if quantizer.scale is None:
        return quantizer.token_dims == (-1,)
    return quantizer.scale.numel() == 1


def linear(layer: PackedLayer, x: Tensor) -> Tensor:
    """The layer on `x`, bfloat16 `[..., in]`; a product for each part of the input, summed."""
    rows = x.flatten(0, -2)
    parts = zip(layer.weights, layer.inputs, rows.split(layer.splits, dim=1), strict=True)
    bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)
    first, *rest = [_product(w, q, part, bias if i == 0 else None) for i, (w, q, part) in enumerate(parts)]
    return sum(rest, first).reshape(*x.shape[:-1], -1)


def _product(weight: PackedWeight, quantizer: Quantizer, x: Tensor, bias: Tensor | None) -> Tensor:
    codes, scale = _quantize(x, quantizer)
    operand = _operand(weight).t()
    if scale.numel() == 1 and weight.scale.numel() == 1:
        return torch._scaled_mm(codes, operand, scale.reshape(()), weight.scale.reshape(()), bias, out_dtype=x.dtype)
    by_row = scale.reshape(-1, 1).expand(len(x), 1).contiguous()
    by_column = weight.scale.reshape(1, -1).expand(1, weight.shape[0]).contiguous()
    return torch._scaled_mm(codes, operand, by_row, by_column, bias, out_dtype=x.dtype)


def _quantize(x: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """E4M3 values of a matrix, contiguous, and their scales, `[1, 1]` or `[rows, 1]`."""
    if quantizer.scale is None:
        scale = quantizer.token_scale(x.float())
    else:
        scale = quantizer.scale
        if not torch.compiler.is_compiling() and kernels.are_for(x):
            from fpq_lightning.kernels.quantize import quantize  # needs Triton

            return quantize(x, scale), scale
    return (x.float() / scale).clamp(E4M3.min, E4M3.max).to(torch.float8_e4m3fn).contiguous(), scale


@lru_cache(maxsize=64)
def _table(fmt: Format, device: torch.device) -> Tensor:
    """The E4M3 code of every code of a format."""
    return E4M3.encode(fmt.values.nan_to_num()).to(device)


def _operand(weight: PackedWeight) -> Tensor:
    """Values of a weight without its scales, float8_e4m3fn `[out, in]`."""
    if weight.format == E4M3:
        return weight.codes
    table, n, codes = _table(weight.format, weight.codes.device), weight.shape[1], weight.codes
    if kernels.are_for(codes):
        return ops.translate(codes, weight.format.bits, table, n).view(torch.float8_e4m3fn)
    return table[unpack(codes, weight.format.bits, n).int()].view(torch.float8_e4m3fn)
