"""Rounding variables to weights, and the regulariser on them, in one pass each, forward and backward.

The same as `LearnedRounding.forward` and `rounding_regulariser`, up to float32 rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpq_lightning.kernels.reference import GAMMA, ZETA

_BLOCK = 1024
_STRETCH, _SHIFT = ZETA - GAMMA, GAMMA  # of the rectified sigmoid


@triton.jit
def _rectified_sigmoid(v, STRETCH: tl.constexpr, SHIFT: tl.constexpr):
    """The rectified sigmoid h and its derivative, which is zero where h is cut off."""
    s = tl.sigmoid(v)
    raw = STRETCH * s + SHIFT
    h = tl.minimum(tl.maximum(raw, 0.0), 1.0)
    slope = tl.where((raw >= 0.0) & (raw <= 1.0), STRETCH * s * (1.0 - s), 0.0)
    return h, slope


@triton.jit
def _weight_forward(
    v_ptr, base_ptr, step_ptr, scale_ptr, offset_ptr, hardness_ptr, out_ptr, length, scale_stride, low, high, n_blocks,
    HAS_OFFSET: tl.constexpr, STRETCH: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, column = program // n_blocks, program % n_blocks * BLOCK + tl.arange(0, BLOCK)
    at, inside = row * length + column, column < length
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    h, _ = _rectified_sigmoid(v, STRETCH, SHIFT)
    hard = tl.where(v >= 0.0, 1.0, 0.0)
    up = h + tl.load(hardness_ptr) * (hard - h)
    place = (tl.load(base_ptr + at, mask=inside, other=0.0) + up) * tl.load(step_ptr + at, mask=inside, other=0.0)
    place = tl.minimum(tl.maximum(place, low), high)
    out = place * tl.load(scale_ptr + row * scale_stride)
    if HAS_OFFSET:
        out = out + tl.load(offset_ptr + row * scale_stride)
    tl.store(out_ptr + at, out, mask=inside)


@triton.jit
def _weight_backward(
    v_ptr, base_ptr, step_ptr, scale_ptr, hardness_ptr, gradient_ptr, dv_ptr, dscale_ptr, length, scale_stride,
    low, high, n_blocks, STRETCH: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, column = program // n_blocks, program % n_blocks * BLOCK + tl.arange(0, BLOCK)
    at, inside = row * length + column, column < length
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0)
    step = tl.load(step_ptr + at, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + row * scale_stride)
    h, slope = _rectified_sigmoid(v, STRETCH, SHIFT)
    hard = tl.where(v >= 0.0, 1.0, 0.0)
    up = h + tl.load(hardness_ptr) * (hard - h)
    place = (tl.load(base_ptr + at, mask=inside, other=0.0) + up) * step
    in_range = (place >= low) & (place <= high)
    tl.store(dv_ptr + at, tl.where(in_range, gradient * scale * step * slope, 0.0), mask=inside)
    place = tl.minimum(tl.maximum(place, low), high)
    tl.store(dscale_ptr + program, tl.sum(tl.where(inside, gradient * place, 0.0), axis=0))


@triton.jit
def _regulariser_forward(v_ptr, beta_ptr, out_ptr, n, STRETCH: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    h, _ = _rectified_sigmoid(tl.load(v_ptr + at, mask=inside, other=0.0), STRETCH, SHIFT)
    distance = tl.abs(2.0 * h - 1.0)
    power = tl.where(distance > 0.0, tl.exp2(tl.load(beta_ptr) * tl.log2(distance)), 0.0)
    tl.store(out_ptr + program, tl.sum(tl.where(inside, 1.0 - power, 0.0), axis=0))


@triton.jit
def _regulariser_backward(
    v_ptr, beta_ptr, gradient_ptr, dv_ptr, n, STRETCH: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    h, slope = _rectified_sigmoid(tl.load(v_ptr + at, mask=inside, other=0.0), STRETCH, SHIFT)
    beta = tl.load(beta_ptr)
    signed = 2.0 * h - 1.0
    distance = tl.abs(signed)
    power = tl.where(distance > 0.0, tl.exp2((beta - 1.0) * tl.log2(distance)), 0.0)
    direction = tl.where(signed < 0.0, -2.0, 2.0)
    dv = -tl.load(gradient_ptr) * beta * power * direction * slope / n
    tl.store(dv_ptr + at, dv, mask=inside)


class _RoundedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, scale: Tensor, base: Tensor, step: Tensor, offset: Tensor | None,
                hardness: Tensor, low: float, high: float) -> Tensor:  # type: ignore[override]  # fmt: skip
        rows, length = v.shape
        block = max(16, min(_BLOCK, triton.next_power_of_2(length)))
        blocks = triton.cdiv(length, block)
        out = torch.empty_like(v)
        ctx.bounds, ctx.scale_stride = (low, high), int(scale.numel() > 1)
        ctx.save_for_backward(v, scale, base, step, hardness)
        _weight_forward[(rows * blocks,)](
            v, base, step, scale, scale if offset is None else offset, hardness, out, length, ctx.scale_stride, low,
            high, blocks, HAS_OFFSET=offset is not None, STRETCH=_STRETCH, SHIFT=_SHIFT, BLOCK=block,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        v, scale, base, step, hardness = ctx.saved_tensors
        rows, length = v.shape
        block = max(16, min(_BLOCK, triton.next_power_of_2(length)))
        blocks = triton.cdiv(length, block)
        dv = torch.empty_like(v)
        partial = torch.empty(rows, blocks, device=v.device)
        _weight_backward[(rows * blocks,)](
            v, base, step, scale, hardness, gradient.contiguous(), dv, partial, length, ctx.scale_stride,
            *ctx.bounds, blocks, STRETCH=_STRETCH, SHIFT=_SHIFT, BLOCK=block,
        )  # fmt: skip
        dscale = partial.sum(1, keepdim=True) if ctx.scale_stride else partial.sum()
        return dv, dscale.reshape(scale.shape), None, None, None, None, None, None


class _Regulariser(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, beta: Tensor) -> Tensor:  # type: ignore[override]
        n = v.numel()
        partial = torch.empty(triton.cdiv(n, _BLOCK), device=v.device)
        _regulariser_forward[(len(partial),)](v, beta, partial, n, STRETCH=_STRETCH, SHIFT=_SHIFT, BLOCK=_BLOCK)
        ctx.save_for_backward(v, beta)
        return partial.sum() / n

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        v, beta = ctx.saved_tensors
        n, dv = v.numel(), torch.empty_like(v)
        grid = (triton.cdiv(n, _BLOCK),)
        _regulariser_backward[grid](v, beta, gradient.contiguous(), dv, n, STRETCH=_STRETCH, SHIFT=_SHIFT, BLOCK=_BLOCK)
        return dv, None


def rounded_weight(
    v: Tensor, scale: Tensor, base: Tensor, step: Tensor, offset: Tensor | None, hardness: Tensor, low: float,
    high: float,
) -> Tensor:  # fmt: skip
    """The rows of a weight whose rounding is being learned; see `LearnedRounding` for the arguments.

    Differentiable in `v` and `scale`. All tensors are contiguous float32; `scale` and `offset` have one value, or one
    for each row; `hardness` has one.
    """
    return _RoundedWeight.apply(v, scale, base, step, offset, hardness, low, high)


def regulariser(v: Tensor, beta: Tensor) -> Tensor:
    """Mean of ``1 - |2 h(v) - 1|^beta``, differentiable in `v`; `beta` has one value."""
    return _Regulariser.apply(v, beta)
