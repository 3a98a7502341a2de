"""E4M3 by E4M3 on tensor cores: Linear layers, by `torch._scaled_mm`.

Only the hardware's own E4M3 can be an operand. A weight in four or six bits can, when every value of its format is one
of E4M3, too: it stays packed in memory, and its codes are translated for each call. The scales, hence a searched real
exponent bias, are applied to the sums. Tensor cores add with some 14 bits (`use_fast_accum`), as is usual for
inference: what that loses is far less than the rounding of the inputs (docs/benchmarks.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fpq_lightning.formats.numbers import Format
from fpq_lightning.kernels import ops, reference
from fpq_lightning.kernels.reference import E4M3
from fpq_lightning.quantization.quantizer import Quantizer
from fpq_lightning.utils.device_cache import cached_tensor

if TYPE_CHECKING:
    from fpq_lightning.nn.packed import PackedLayer, PackedWeight

ALIGNMENT = 16
"""Bytes that rows and columns of operands are multiples of."""


@lru_cache(maxsize=64)
def embeds(fmt: Format) -> bool:
    """Whether every value of a format is one of E4M3."""
    values = fmt.grid
    return bool((E4M3.quantize(values) == values).all())


def fits(layer: PackedLayer) -> bool:
    """Whether both operands of a Linear layer are E4M3 up to scales of output channels and of rows of the input."""
    return (
        isinstance(layer, nn.Linear)
        and operands_fit(layer)
        and layer.shape[0] % ALIGNMENT == 0
        and all(has_one_scale(q) or q.token_dims == (-1,) for q in layer.inputs)
    )


def operands_fit(layer: PackedLayer) -> bool:
    """Whether the values of weight and input are E4M3's, and their numbers of channels what copies ask for."""
    return (
        len(layer.weights) > 0
        and len(layer.inputs) > 0
        and all(embeds(w.format) and w.offset is None and w.scale.shape[1] == 1 for w in layer.weights)
        and all(q.format == E4M3 and q.offset is None for q in layer.inputs)
        and all(n % ALIGNMENT == 0 for n in layer.splits)
    )


def has_one_scale(quantizer: Quantizer) -> bool:
    """Whether it is static, with one scale."""
    return quantizer.scale is not None and quantizer.scale.numel() == 1


def run(layer: PackedLayer, x: Tensor) -> Tensor:
    """The layer on `x`, bfloat16 `[..., in]`."""
    if x.ndim == 2:
        return sum_of_parts(layer, x, _product)
    return sum_of_parts(layer, x.reshape(-1, x.shape[-1]), _product).reshape(*x.shape[:-1], layer.shape[0])


def sum_of_parts(layer: PackedLayer, x: Tensor, product: Callable[..., Tensor]) -> Tensor:
    """A product for each part of the input, summed; `product` takes weight, quantizer, input and bias."""
    bias: Tensor | None = layer.bias
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    total = product(layer.weights[0], layer.inputs[0], x if len(layer.splits) == 1 else _part(layer, x, 0), bias)
    for i in range(1, len(layer.splits)):
        total = total + product(layer.weights[i], layer.inputs[i], _part(layer, x, i), None)
    return total


def _part(layer: PackedLayer, x: Tensor, i: int) -> Tensor:
    return x.narrow(layer.channel_dim, sum(layer.splits[:i]), layer.splits[i])


def _product(weight: PackedWeight, quantizer: Quantizer, x: Tensor, bias: Tensor | None) -> Tensor:
    scale = quantizer.scale
    if scale is not None:
        return multiply(ops.round_to_e4m3(x, scale), weight, scale, bias, x.dtype)
    scale = quantizer.token_scale(x.float())
    return _scaled_mm(reference.round_to_e4m3(x, scale), weight, scale, column_scale(weight, None), bias, x.dtype)


def multiply(codes: Tensor, weight: PackedWeight, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of rows of E4M3 values `[n, in]` of one scale with a weight `[out, in]`, plus a bias."""
    scalar = scale.reshape(())
    if weight.scale.numel() == 1:  # compilers take scalars alone for a scale of the whole tensor
        return _scaled_mm(codes, weight, scalar, weight.scale.reshape(()), bias, dtype)
    if not torch.compiler.is_compiling():
        return _scaled_mm(codes, weight, _ones(len(codes), codes.device), column_scale(weight, scale), bias, dtype)
    # Products with scales of rows take up to 1.4 times as long, and compilers join scales to what comes next.
    plain = _scaled_mm(codes, weight, scalar, _one(codes.device), None, dtype)
    scaled = plain * weight.scale.reshape(-1)
    return (scaled if bias is None else scaled + bias).to(dtype)


def _scaled_mm(
    codes: Tensor, weight: PackedWeight, scale: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return torch._scaled_mm(codes, operand(weight).t(), scale, column, bias, out_dtype=dtype, use_fast_accum=True)


def column_scale(weight: PackedWeight, factor: Tensor | None) -> Tensor:
    """What multiplies the sums of each output channel, float32 `[1, out]`: its scale, times that of the input."""
    scale = weight.scale
    if torch.compiler.is_compiling() or scale.is_inference() or (factor is not None and factor.is_inference()):
        return _made_column(scale, factor, weight.shape[0])
    versions = (scale._version, None if factor is None else factor._version)
    kept = weight.column
    if kept is None or kept[0] is not scale or kept[1] is not factor or kept[2] != versions:
        kept = weight.column = (scale, factor, versions, _made_column(scale, factor, weight.shape[0]))
    return kept[3]


def _made_column(scale: Tensor, factor: Tensor | None, n: int) -> Tensor:
    scale = scale if factor is None else scale * factor.reshape(())
    return scale.reshape(1, -1).expand(1, n).contiguous()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _one(device: torch.device) -> Tensor:
    """The scale of what has none, `[]`."""
    return _kept_one(device)


@cached_tensor
def _kept_one(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.float32, device=device)


def _ones(n: int, device: torch.device) -> Tensor:
    """Scales of `n` rows that have none of their own, `[n, 1]`."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.ones(n, 1, dtype=torch.float32, device=device)
    return _kept_ones(1 << (n - 1).bit_length(), device)[:n]


@cached_tensor
def _kept_ones(n: int, device: torch.device) -> Tensor:
    return torch.ones(n, 1, dtype=torch.float32, device=device)


def operand(weight: PackedWeight) -> Tensor:
    """Values of a weight without its scales, float8_e4m3fn `[out, in]`, of a filter `[out, places * in]`."""
    taps = math.prod(weight.shape[2:])
    if weight.codes.dtype == torch.float8_e4m3fn and taps == 1:
        return weight.codes
    return ops.translate(weight.bytes, weight.format, weight.shape[1], taps).view(torch.float8_e4m3fn)
