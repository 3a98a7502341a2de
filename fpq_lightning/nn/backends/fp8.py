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

import torch
from torch import Tensor

from fpq_lightning.formats.numbers import Format
from fpq_lightning.kernels import ops, reference
from fpq_lightning.kernels.reference import E4M3
from fpq_lightning.nn.backends.paths import PATHS, ArithmeticPath
from fpq_lightning.nn.operands import Operands
from fpq_lightning.nn.packed_weight import PackedWeight
from fpq_lightning.quantization.quantizer import Quantizer
from fpq_lightning.utils.device_cache import cached_tensor

ALIGNMENT = 16
"""Bytes that rows and columns of operands are multiples of."""


@lru_cache(maxsize=64)
def embeds(fmt: Format) -> bool:
    """Whether every value of a format is one of E4M3."""
    values = fmt.grid
    return bool((E4M3.quantize(values) == values).all())


def fits(operands: Operands) -> bool:
    """Whether both operands of a Linear layer are E4M3 up to scales of output channels and of rows of the input."""
    return (
        operands.convolution is None
        and operands_fit(operands)
        and operands.outputs % ALIGNMENT == 0
        and all(has_one_scale(q) or q.token_dims == (-1,) for q in operands.inputs)
    )


def operands_fit(operands: Operands) -> bool:
    """Whether the values of weight and input are E4M3's, and their numbers of channels what copies ask for."""
    return (
        bool(operands.weights)
        and bool(operands.inputs)
        and all(embeds(w.format) and w.offset is None and w.scale.shape[1] == 1 for w in operands.weights)
        and all(q.format == E4M3 and q.offset is None for q in operands.inputs)
        and all(n % ALIGNMENT == 0 for n in operands.splits)
    )


def has_one_scale(quantizer: Quantizer) -> bool:
    """Whether it is static, with one scale."""
    return quantizer.scale is not None and quantizer.scale.numel() == 1


def run(x: Tensor, operands: Operands) -> Tensor:
    """A layer on `x`, bfloat16 `[..., in]`."""
    if x.ndim == 2:
        return sum_of_parts(x, operands, _product)
    rows = x.reshape(-1, x.shape[-1])
    return sum_of_parts(rows, operands, _product).reshape(*x.shape[:-1], operands.outputs)


def sum_of_parts(x: Tensor, operands: Operands, product: Callable[..., Tensor]) -> Tensor:
    """A product for each part of the input, summed; `product` takes weight, quantizer, input and bias."""
    weights, inputs, splits, bias, _ = operands
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if len(splits) == 1:
        return product(weights[0], inputs[0], x, bias)
    first, *others = zip(weights, inputs, x.split(splits, dim=operands.channel_dim), strict=True)
    total = product(*first, bias)
    for part in others:
        total = total + product(*part, None)
    return total


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
    sources = (weight.scale,) if factor is None else (weight.scale, factor)

    def make() -> Tensor:
        scale = weight.scale if factor is None else weight.scale * factor.reshape(())
        return scale.reshape(1, -1).expand(1, weight.shape[0]).contiguous()

    return make() if torch.compiler.is_compiling() else weight.column.get(make, *sources)


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


PATHS.register(
    ArithmeticPath(
        name="fp8",
        help="Linear layers: E4M3 by E4M3 on tensor cores",
        rank=10,
        fits=fits,
        available=lambda hardware, dtype: hardware.multiplies_fp8 and dtype == torch.bfloat16,
        run=run,
    )
)
