"""Activations to E4M3 codes with one scale, in one pass."""

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpq_lightning.formats import Spacing, parse_format
from fpq_lightning.kernels.fake_quantize import round_to_grid

_BLOCK = 1024
_SPACING = cast(Spacing, parse_format("float8_e4m3fn").spacing)


@triton.jit
def _quantize(
    x_ptr, scale_ptr, out_ptr, n, LOW: tl.constexpr, HIGH: tl.constexpr, NORMAL: tl.constexpr, RELATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    # On the grid already, so that the conversion has nothing to round.
    y = round_to_grid(tl.div_rn(x, tl.load(scale_ptr)), LOW, HIGH, NORMAL, RELATIVE)
    tl.store(out_ptr + at, y.to(tl.float8e4nv), mask=at < n)


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """E4M3 values nearest to ``x / scale``, ties to even, saturating.

    Args:
        x: any shape, float32, float16 or bfloat16.
        scale: one float32 value.

    Returns:
        float8_e4m3fn of the shape of `x`, contiguous.
    """
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    _quantize[(triton.cdiv(x.numel(), _BLOCK),)](
        x, scale, out, x.numel(), LOW=_SPACING.low, HIGH=_SPACING.high, NORMAL=_SPACING.smallest_normal,
        RELATIVE=_SPACING.relative_step, BLOCK=_BLOCK,
    )  # fmt: skip
    return out
