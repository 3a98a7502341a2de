"""Two-dimensional convolutions of E4M3 by E4M3, as a product for each place of the filter, summed in one program.

The pixels of an output tile read a rectangle of the input for each place of the filter, which the GPU's copy engine
fetches whole, with zeros beyond the edges; so nothing is ever unfolded or padded in memory.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fpq_lightning.kernels.launch import Launcher

STEP = 32
"""Input channels of the shortest step."""


class Tiling(NamedTuple):
    """How a convolution is cut.

    Attributes:
        height, width: pixels of the output of a program.
        outputs: output channels of a program.
        inputs: input channels of a step.
        warps: of a program.
        stages: of its pipeline.
    """

    height: int
    width: int
    outputs: int
    inputs: int
    warps: int
    stages: int


@triton.jit
def _conv(
    x_desc, weight_desc, scale_ptr, factor_ptr, bias_ptr, out_ptr, scale_stride, height, width, n_out, tiles_down,
    tiles_across,
    C: tl.constexpr, TAPS: tl.constexpr, TAPS_ACROSS: tl.constexpr, STRIDE: tl.constexpr, PAD_DOWN: tl.constexpr,
    PAD_ACROSS: tl.constexpr, HAS_BIAS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first_out = tl.program_id(1) * BLOCK_N
    image = tile // (tiles_down * tiles_across)
    top = tile // tiles_across % tiles_down * BLOCK_H
    left = tile % tiles_across * BLOCK_W
    # Sums of transposed tiles: an operand that is reshaped must be the second one. As the first, Triton (3.6 to 3.9)
    # takes it from registers on Hopper, which it fills again before the tensor cores have read them.
    total = tl.zeros((BLOCK_N, BLOCK_H * BLOCK_W), dtype=tl.float32)
    steps: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    for step in range(TAPS * steps):
        tap = step // steps
        channel = step % steps * BLOCK_C
        # In units of the stride, rounded down: moved by whole strides so that no number is negative.
        down = tap // TAPS_ACROSS + (STRIDE - 1) * PAD_DOWN
        across = tap % TAPS_ACROSS + (STRIDE - 1) * PAD_ACROSS
        place = [
            image, top + down // STRIDE - PAD_DOWN, down % STRIDE,
            left + across // STRIDE - PAD_ACROSS, across % STRIDE * C + channel,
        ]  # fmt: skip
        x = x_desc.load(place).reshape(BLOCK_H * BLOCK_W, BLOCK_C)
        weight = weight_desc.load([first_out, tap * C + channel])  # beyond the channels next place's, which x has as 0
        total = tl.dot(weight, x.T, total)
    outs = first_out + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr + outs * scale_stride, mask=outs < n_out, other=0.0) * tl.load(factor_ptr)
    total = total * scale[:, None]
    if HAS_BIAS:
        total += tl.load(bias_ptr + outs, mask=outs < n_out, other=0.0).to(tl.float32)[:, None]
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    y, x = top + pixel // BLOCK_W, left + pixel % BLOCK_W
    inside = (outs < n_out)[:, None] & ((y < height) & (x < width))[None, :]
    if CHANNELS_LAST:
        at = ((image * height + y) * width + x).to(tl.int64)[:, None] * n_out + outs[None, :]
        tl.store(out_ptr + at, total.T.to(out_ptr.dtype.element_ty), mask=inside.T)
    else:
        at = ((image * n_out + outs).to(tl.int64)[:, None] * height + y[None, :]) * width + x[None, :]
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def tiling_for(height: int, width: int, channels: int, n_out: int) -> Tiling:
    """The fastest tiling on an H200 by size (docs/benchmarks.md)."""
    across, outputs = min(16, max(8, triton.next_power_of_2(width))), 128 if n_out > 64 else 64
    inputs = next((n for n in (128, 64) if channels % n == 0), STEP)
    if height * width >= 2**14:
        return Tiling(256 // across, across, outputs, min(64, inputs), 8, 4)
    warps = 8 if height * width <= 2**10 and inputs == outputs == 128 else 4
    return Tiling(128 // across, across, outputs, inputs, warps, 3 if inputs == 128 else 4)


def conv(
    x: Tensor, weight: Tensor, scale: Tensor, factor: Tensor, bias: Tensor | None, stride: int,
    padding: tuple[int, int], dtype: torch.dtype, channels_last: bool = True, tiling: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """The convolution of `x` with `weight`, times `scale` and `factor`, plus `bias`; summed in float32.

    Args:
        x: float8_e4m3fn `[b, h, w, in]`, contiguous; height and width multiples of the stride, channels of 16,
            and of `STEP` where the stride is not 1.
        weight: float8_e4m3fn `[out, down, across, in]`, contiguous.
        scale: float32 `[1, 1]` or `[out, 1]`, contiguous: of the weight.
        factor: float32, one value: the scale of `x`.
        bias: `[out]`, or None.
        stride: of both directions.
        padding: zeros around height and width.
        dtype: of the result.
        channels_last: whether the channels of a pixel of the result are neighbours, or the pixels of a channel.
        tiling: how it is cut; by size if None.

    Returns:
        `[b, h', w', out]`, or `[b, out, h', w']` without `channels_last`; contiguous.
    """
    (b, h, w, c), (n, down, across, _) = x.shape, weight.shape
    height, width = (h + 2 * padding[0] - down) // stride + 1, (w + 2 * padding[1] - across) // stride + 1
    cut = tiling_for(height, width, c, n) if tiling is None else tiling
    shape = (b, height, width, n) if channels_last else (b, n, height, width)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    # Pixels by what is left of their place when divided by the stride, so that those of a tile are neighbours.
    pixels = x.view(b, h // stride, stride, w // stride, stride * c)
    tiles = triton.cdiv(height, cut.height), triton.cdiv(width, cut.width)
    _launcher(cut, c, down * across, across, stride, padding, bias is not None, channels_last)(
        (b * tiles[0] * tiles[1], triton.cdiv(n, cut.outputs), 1),
        TensorDescriptor.from_tensor(pixels, [1, cut.height, 1, cut.width, cut.inputs]),
        TensorDescriptor.from_tensor(weight.view(n, down * across * c), [cut.outputs, cut.inputs]),
        scale, factor, scale if bias is None else bias, out, 1 if scale.shape[0] > 1 else 0, height, width, n, *tiles,
    )  # fmt: skip
    return out


@lru_cache(maxsize=256)
def _launcher(
    cut: Tiling, channels: int, taps: int, across: int, stride: int, padding: tuple[int, int], has_bias: bool,
    channels_last: bool,
) -> Launcher:  # fmt: skip
    return Launcher(
        _conv, C=channels, TAPS=taps, TAPS_ACROSS=across, STRIDE=stride, PAD_DOWN=padding[0], PAD_ACROSS=padding[1],
        HAS_BIAS=has_bias, CHANNELS_LAST=channels_last, BLOCK_H=cut.height, BLOCK_W=cut.width, BLOCK_N=cut.outputs,
        BLOCK_C=cut.inputs, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
