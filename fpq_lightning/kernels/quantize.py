"""Activations to E4M3 codes with one scale, in one pass."""

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpq_lightning.formats import Spacing, parse_format
from fpq_lightning.kernels.fake_quantize import round_to_grid
from fpq_lightning.kernels.launch import Launcher

_BLOCK = 2048  # 16 elements a thread: whole memory transactions of either type


@triton.jit
def _quantize(
    x_ptr, scale_ptr, out_ptr, n, LOW: tl.constexpr, HIGH: tl.constexpr, NORMAL: tl.constexpr, RELATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    # By the reciprocal, for divisions would take longer than reading the tensor. On the grid already, so that the
    # conversion has nothing to round, which Triton's interpreter does otherwise.
    y = round_to_grid(x * tl.div_rn(1.0, tl.load(scale_ptr)), LOW, HIGH, NORMAL, RELATIVE)
    tl.store(out_ptr + at, y.to(tl.float8e4nv), mask=at < n)


_SPACING = cast(Spacing, parse_format("float8_e4m3fn").spacing)
_launch = Launcher(
    _quantize, LOW=_SPACING.low, HIGH=_SPACING.high, NORMAL=_SPACING.smallest_normal, RELATIVE=_SPACING.relative_step,
    BLOCK=_BLOCK,
)  # fmt: skip


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """E4M3 values nearest to ``x * (1 / scale)``, ties to even, saturating.

    Args:
        x: any shape, float32, float16 or bfloat16.
        scale: one float32 value.

    Returns:
        float8_e4m3fn of the shape of `x`, contiguous.
    """
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    _launch((-(-x.numel() // _BLOCK), 1, 1), x, scale, out, x.numel())
    return out
