"""Activations to E4M3 codes with one scale, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpq_lightning.formats.numbers import parse_format
from fpq_lightning.kernels.fake_quantize import round_to_grid
from fpq_lightning.kernels.launch import Launcher

_BLOCK = 2048  # 16 elements a thread: whole memory transactions of either type
_BLOCK_PIXELS, _BLOCK_CHANNELS = 64, 64


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


@triton.jit
def _quantize_pixels(
    x_ptr, scale_ptr, out_ptr, channels, pixels, image_stride, tiles, LOW: tl.constexpr, HIGH: tl.constexpr,
    NORMAL: tl.constexpr, RELATIVE: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // tiles).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    pixel = tl.program_id(0) % tiles * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    inside = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    at = image * image_stride + channel.to(tl.int64)[:, None] * pixels + pixel[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = round_to_grid(x * tl.div_rn(1.0, tl.load(scale_ptr)), LOW, HIGH, NORMAL, RELATIVE).to(tl.float8e4nv)
    at = (image * pixels + pixel)[:, None] * channels + channel[None, :]
    tl.store(out_ptr + at, y.T, mask=inside.T)


_SPACING = parse_format("float8_e4m3fn").spacing
_GRID = {
    "LOW": _SPACING.low, "HIGH": _SPACING.high, "NORMAL": _SPACING.smallest_normal, "RELATIVE": _SPACING.relative_step,
}  # fmt: skip
_launch = Launcher(_quantize, **_GRID, BLOCK=_BLOCK)
_launch_pixels = Launcher(_quantize_pixels, **_GRID, BLOCK_PIXELS=_BLOCK_PIXELS, BLOCK_CHANNELS=_BLOCK_CHANNELS)


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


def quantize_pixels(x: Tensor, scale: Tensor) -> Tensor:
    """`quantize` of images whose channels are to become neighbours.

    Args:
        x: `[b, channels, height, width]`, float32, float16 or bfloat16.
        scale: one float32 value.

    Returns:
        float8_e4m3fn `[b, height, width, channels]`, contiguous.
    """
    b, channels, height, width = x.shape
    if x.stride()[1:] != (height * width, width, 1):
        x = x.contiguous()
    out = torch.empty(b, height, width, channels, dtype=torch.float8_e4m3fn, device=x.device)
    tiles = -(-height * width // _BLOCK_PIXELS)
    grid = b * tiles, -(-channels // _BLOCK_CHANNELS), 1
    _launch_pixels(grid, x, scale, out, channels, height * width, x.stride(0), tiles)
    return out
