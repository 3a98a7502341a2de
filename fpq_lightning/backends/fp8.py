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
    rows = x.reshape(-1, x.shape[-1])
    parts = [rows] if len(layer.splits) == 1 else rows.split(layer.splits, dim=1)
    bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)
    first, *rest = [
        _product(w, q, part, bias if i == 0 else None)
        for i, (w, q, part) in enumerate(zip(layer.weights, layer.inputs, parts, strict=True))
    ]
    return sum(rest, first).reshape(*x.shape[:-1], layer.shape[0])


def _product(weight: PackedWeight, quantizer: Quantizer, x: Tensor, bias: Tensor | None) -> Tensor:
    operand = _operand(weight).t()
    if quantizer.scale is None:
        scale = quantizer.token_scale(x.float())
        return torch._scaled_mm(_round(x, scale), operand, scale, _column(weight, None), bias, out_dtype=x.dtype)
    scale = quantizer.scale.reshape(())
    codes = _quantize(x, scale)
    if weight.scale.numel() == 1:
        return torch._scaled_mm(codes, operand, scale, weight.scale.reshape(()), bias, out_dtype=x.dtype)
    ones = _ones(len(x), x.device)
    return torch._scaled_mm(codes, operand, ones, _column(weight, quantizer.scale), bias, out_dtype=x.dtype)


def _column(weight: PackedWeight, factor: Tensor | None) -> Tensor:
    """What multiplies the sums of each output channel, float32 `[1, out]`: its scale, times that of the input."""
    scale = weight.scale
    if torch.compiler.is_compiling() or scale.is_inference():
        return _made_column(scale, factor, weight.shape[0])
    versions = (scale._version, None if factor is None else factor._version)
    kept = weight.column
    if kept is None or kept[0] is not scale or kept[1] is not factor or kept[2] != versions:
        kept = weight.column = (scale, factor, versions, _made_column(scale, factor, weight.shape[0]))
    return kept[3]


def _made_column(scale: Tensor, factor: Tensor | None, n: int) -> Tensor:
    scale = scale if factor is None else scale * factor.reshape(())
    return scale.reshape(1, -1).expand(1, n).contiguous()


def _quantize(x: Tensor, scale: Tensor) -> Tensor:
    """E4M3 values of a matrix, contiguous, with one scale."""
    if not torch.compiler.is_compiling() and kernels.are_for(x):
        from fpq_lightning.kernels.quantize import quantize  # needs Triton

        return quantize(x, scale)
    return _round(x, scale)


def _round(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).clamp(E4M3.min, E4M3.max).to(torch.float8_e4m3fn).contiguous()


def _ones(n: int, device: torch.device) -> Tensor:
    """Scales of `n` rows that have none of their own, `[n, 1]`."""
    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.ones(n, 1, device=device)
    return _kept_ones(1 << (n - 1).bit_length(), device)[:n]


@lru_cache(maxsize=16)
def _kept_ones(n: int, device: torch.device) -> Tensor:
    return torch.ones(n, 1, device=device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _table(fmt: str, device: torch.device) -> Tensor:
    """The E4M3 code of every code of a format."""
    return _kept_table(fmt, device)


@lru_cache(maxsize=64)
def _kept_table(fmt: str, device: torch.device) -> Tensor:
    return E4M3.encode(parse_format(fmt).values.nan_to_num()).to(device)


def _operand(weight: PackedWeight) -> Tensor:
    """Values of a weight without its scales, float8_e4m3fn `[out, in]`."""
    if weight.format == E4M3:
        return weight.codes
    table, n, codes = _table(weight.format.name, weight.codes.device), weight.shape[1], weight.codes
    if kernels.are_for(codes):
        return ops.translate(codes, weight.format.bits, table, n).view(torch.float8_e4m3fn)
    return table[unpack(codes, weight.format.bits, n).int()].view(torch.float8_e4m3fn)
