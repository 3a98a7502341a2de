"""Rounding the columns of a weight one after the other, a block of columns in one launch.

Each program has one output channel, whose columns lie in registers while they are rounded in turn. The same as the
loops of `fpq_lightning.kernels.reference`, up to float32 rounding.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpq_lightning.formats.numbers import Spacing
from fpq_lightning.kernels.fake_quantize import round_to_grid
from fpq_lightning.kernels.launch import Launcher


@triton.jit
def _at(x, here):
    """The element of a vector where `here` is true."""
    return tl.sum(tl.where(here, x, 0.0), axis=0)


@triton.jit
def _descend(
    q_ptr, gradient_ptr, hessian_ptr, scale_ptr, offset_ptr, out_ptr, n, rows,
    LOW: tl.constexpr, HIGH: tl.constexpr, NORMAL: tl.constexpr, RELATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < n
    at = tl.program_id(0).to(tl.int64) * n + column
    matrix = (tl.program_id(0) // rows).to(tl.int64) * n * n  # of the group of these rows
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + at, mask=inside, other=1.0)
    offset = tl.load(offset_ptr + at, mask=inside, other=0.0)
    for j in range(n):
        here = column == j
        row = tl.load(hessian_ptr + matrix + j * n + column, mask=inside, other=0.0)
        old, s, o = _at(q, here), _at(scale, here), _at(offset, here)
        wanted = old + tl.div_rn(_at(gradient, here), _at(row, here))
        new = round_to_grid(tl.div_rn(wanted - o, s), LOW, HIGH, NORMAL, RELATIVE) * s + o
        gradient -= (new - old) * row
        q = tl.where(here, new, q)
    tl.store(out_ptr + at, q, mask=inside)


@triton.jit
def _compensate(
    left_ptr, factor_ptr, scale_ptr, offset_ptr, out_ptr, error_ptr, n, rows,
    LOW: tl.constexpr, HIGH: tl.constexpr, NORMAL: tl.constexpr, RELATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < n
    at = tl.program_id(0).to(tl.int64) * n + column
    matrix = (tl.program_id(0) // rows).to(tl.int64) * n * n  # of the group of these rows
    left = tl.load(left_ptr + at, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + at, mask=inside, other=1.0)
    offset = tl.load(offset_ptr + at, mask=inside, other=0.0)
    q, errors = tl.zeros_like(left), tl.zeros_like(left)
    for j in range(n):
        here = column == j
        row = tl.load(factor_ptr + matrix + j * n + column, mask=inside & (column >= j), other=0.0)
        value, s, o = _at(left, here), _at(scale, here), _at(offset, here)
        new = round_to_grid(tl.div_rn(value - o, s), LOW, HIGH, NORMAL, RELATIVE) * s + o
        error = tl.div_rn(value - new, _at(row, here))
        left -= error * row
        q = tl.where(here, new, q)
        errors = tl.where(here, error, errors)
    tl.store(out_ptr + at, q, mask=inside)
    tl.store(error_ptr + at, errors, mask=inside)


@lru_cache(maxsize=256)
def _launcher(kernel: Any, spacing: Spacing, block: int) -> Launcher:
    return Launcher(
        kernel, LOW=spacing.low, HIGH=spacing.high, NORMAL=spacing.smallest_normal, RELATIVE=spacing.relative_step,
        BLOCK=block, enable_fp_fusion=False,
    )  # fmt: skip


def _launch(kernel: Any, spacing: Spacing, groups: int, *tensors: Tensor) -> None:
    out, n = tensors[0].shape
    _launcher(kernel, spacing, max(16, triton.next_power_of_2(n)))((out, 1, 1), *tensors, n, out // groups)


def descend_columns(
    q: Tensor, gradient: Tensor, hessian: Tensor, scale: Tensor, offset: Tensor, spacing: Spacing
) -> Tensor:
    """See `fpq_lightning.kernels.ops.descend_columns`; takes the spacing of the format."""
    operands = [x.contiguous() for x in (q, gradient, hessian, scale, offset)]
    out = torch.empty_like(operands[0])
    _launch(_descend, spacing, len(hessian), *operands, out)
    return out


def compensate_columns(
    left: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, spacing: Spacing
) -> tuple[Tensor, Tensor]:
    """See `fpq_lightning.kernels.ops.compensate_columns`; takes the spacing of the format."""
    operands = [x.contiguous() for x in (left, factor, scale, offset)]
    out, errors = torch.empty_like(operands[0]), torch.empty_like(operands[0])
    _launch(_compensate, spacing, len(factor), *operands, out, errors)
    return out, errors
