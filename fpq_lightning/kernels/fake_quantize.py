"""Quantizing and dequantizing in one pass over the tensor, forward and backward.

Bit-equal to `Format.quantize` between the scalings of `Quantizer`; gradients agree up to float32 rounding.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpq_lightning.formats.numbers import Spacing
from fpq_lightning.kernels.launch import Launcher

_BLOCK = 1024


@triton.jit
def round_to_grid(y, LOW: tl.constexpr, HIGH: tl.constexpr, NORMAL: tl.constexpr, RELATIVE: tl.constexpr):
    """The nearest grid value, ties to even."""
    if LOW == 0.0:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL) + 0.0
    y = tl.clamp(y, LOW, HIGH, propagate_nan=tl.PropagateNan.ALL)
    bits = y.to(tl.int32, bitcast=True)
    magnitude = tl.abs(y)
    if RELATIVE == 0.0:
        rounded = (magnitude + 12582912.0) - 12582912.0  # 1.5 * 2^23: to an integer, ties to even
    else:
        binade = (bits & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.maximum(binade, NORMAL, propagate_nan=tl.PropagateNan.ALL) * RELATIVE
        if RELATIVE == 1.0:  # no mantissa: whether a code is even depends on the binade
            smallest = tl.full(step.shape, NORMAL, tl.float32).to(tl.int32, bitcast=True)
            code = ((step.to(tl.int32, bitcast=True) - smallest) >> 23) + 1
            lower = tl.where(magnitude < NORMAL, 0.0, step)
            middle = lower + 0.5 * step
            up = (magnitude > middle) | ((magnitude == middle) & (lower > 0.0) & (code % 2 == 1))
            rounded = tl.where(magnitude == magnitude, tl.where(up, lower + step, lower), magnitude)
        else:
            rounded = (magnitude + 12582912.0 * step) - 12582912.0 * step
    if RELATIVE == 0.0:  # two's complement has no negative zero
        return tl.where(bits < 0, 0.0 - rounded, rounded)
    return (rounded.to(tl.int32, bitcast=True) | (bits & -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def _forward(
    x_ptr, scale_ptr, offset_ptr, out_ptr, n,
    HAS_OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, NORMAL: tl.constexpr, RELATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    scale = tl.load(scale_ptr)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        offset = tl.load(offset_ptr)
        x = x - offset
    out = round_to_grid(tl.div_rn(x, scale), LOW, HIGH, NORMAL, RELATIVE) * scale
    if HAS_OFFSET:
        out = out + offset
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x_ptr, scale_ptr, offset_ptr, gradient_ptr, dx_ptr, dscale_ptr, n,
    HAS_OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, NORMAL: tl.constexpr, RELATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    scale = tl.load(scale_ptr)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        x = x - tl.load(offset_ptr)
    y = tl.div_rn(x, scale)
    in_range = (y >= LOW) & (y <= HIGH)
    tl.store(dx_ptr + at, tl.where(in_range, gradient, 0.0).to(dx_ptr.dtype.element_ty), mask=inside)
    # LSQ (Esser et al. 2020): value - x / scale inside the range, the bound outside.
    dscale = gradient * (round_to_grid(y, LOW, HIGH, NORMAL, RELATIVE) - tl.where(in_range, y, 0.0))
    tl.store(dscale_ptr + program, tl.sum(tl.where(inside, dscale, 0.0), axis=0))


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, spacing: Spacing) -> Tensor:  # type: ignore[override]
        x = x.contiguous()
        ctx.spacing, ctx.has_offset = spacing, offset is not None
        ctx.save_for_backward(x, scale, scale if offset is None else offset)
        return _quantized(x, scale, offset, spacing)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        x, scale, offset = ctx.saved_tensors
        dx = torch.empty_like(x)
        partial = torch.empty(triton.cdiv(x.numel(), _BLOCK), device=x.device)
        _launch(_backward, x.numel(), ctx.spacing, ctx.has_offset, x, scale, offset, gradient.contiguous(), dx, partial)
        return dx, partial.sum().reshape(scale.shape), None, None


def _quantized(x: Tensor, scale: Tensor, offset: Tensor | None, spacing: Spacing) -> Tensor:
    out = torch.empty_like(x)
    # Without an offset its pointer is not read.
    _launch(_forward, x.numel(), spacing, offset is not None, x, scale, scale if offset is None else offset, out)
    return out


def _launch(kernel: Any, n: int, spacing: Spacing, has_offset: bool, *tensors: Tensor) -> None:
    _launcher(kernel, spacing, has_offset)((-(-n // _BLOCK), 1, 1), *tensors, n)


@lru_cache(maxsize=256)
def _launcher(kernel: Any, spacing: Spacing, has_offset: bool) -> Launcher:
    # Fused multiply-adds would round once where torch rounds twice.
    return Launcher(
        kernel, HAS_OFFSET=has_offset, LOW=spacing.low, HIGH=spacing.high, NORMAL=spacing.smallest_normal,
        RELATIVE=spacing.relative_step, BLOCK=_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip


def fake_quantize(x: Tensor, scale: Tensor, offset: Tensor | None, spacing: Spacing) -> Tensor:
    """Quantizes a tensor with one scale; differentiable in `x` (straight through) and `scale`.

    Args:
        x: any shape, float32, float16 or bfloat16.
        scale: one float32 value.
        offset: the value of code zero, one float32 value, or None.
        spacing: of the format.

    Returns:
        The shape and dtype of `x`.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return _FakeQuantize.apply(x, scale, offset, spacing)
    return _quantized(x.contiguous(), scale, offset, spacing)
