"""E4M3 by E4M3 on tensor cores: two-dimensional convolutions, by our own kernel."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the usual name

from fpq_lightning.kernels import ops
from fpq_lightning.kernels.availability import kernels_run_for
from fpq_lightning.nn.backends import fp8
from fpq_lightning.nn.backends.paths import PATHS, ArithmeticPath
from fpq_lightning.nn.operands import Convolution, Operands
from fpq_lightning.nn.packed_weight import PackedWeight
from fpq_lightning.quantization.quantizer import Quantizer

_STRIDED_CHANNELS = 32  # what those of a part are multiples of where the stride is not 1


def fits(operands: Operands) -> bool:
    """Whether it is a plain convolution of operands that are E4M3 up to scales of output channels and of the input."""
    how = operands.convolution
    return (
        how is not None
        and len(how.stride) == 2
        and fp8.operands_fit(operands)
        and (how.groups, how.dilation, how.padding_mode) == (1, (1, 1), "zeros")
        and how.stride[0] == how.stride[1]
        and (how.stride[0] == 1 or all(n % _STRIDED_CHANNELS == 0 for n in operands.splits))
        and not isinstance(how.padding, str)
        and all(map(fp8.has_one_scale, operands.inputs))
    )


def run(x: Tensor, operands: Operands) -> Tensor:
    """A layer on `x`, bfloat16 `[b, in, h, w]`; the result has its memory format, compiled that of channels last."""
    how = cast(Convolution, operands.convolution)
    return fp8.sum_of_parts(x, operands, partial(_product, how.stride[0], cast("tuple[int, int]", how.padding)))


def _product(
    stride: int, padding: tuple[int, int], weight: PackedWeight, quantizer: Quantizer, x: Tensor, bias: Tensor | None
) -> Tensor:
    scale, pixels = cast(Tensor, quantizer.scale), x.permute(0, 2, 3, 1)
    (height, width), taps = x.shape[2:], weight.shape[2:]
    channels_last = torch.compiler.is_compiling() or x.stride(1) == 1
    codes = ops.round_to_e4m3(pixels, scale) if channels_last else ops.round_pixels_to_e4m3(x, scale)
    is_product = (*taps, stride, *padding) == (1, 1, 1, 0, 0) and weight.shape[0] % fp8.ALIGNMENT == 0
    if channels_last and is_product:
        rows = fp8.multiply(codes.flatten(0, 2), weight, scale, bias, x.dtype)
        return rows.unflatten(0, codes.shape[:3]).permute(0, 3, 1, 2)
    down, across = -height % stride, -width % stride
    if down or across:
        codes = F.pad(codes.view(torch.uint8), (0, 0, 0, across, 0, down)).view(codes.dtype)
    operand = fp8.operand(weight).view(weight.shape[0], *taps, weight.shape[1])
    out = ops.conv(codes, operand, weight.scale, scale.reshape(()), bias, stride, padding, x.dtype, channels_last)
    if channels_last:
        out = out.permute(0, 3, 1, 2)
    if down or across:  # what was added is not to be seen
        high = (height + 2 * padding[0] - taps[0]) // stride + 1
        wide = (width + 2 * padding[1] - taps[1]) // stride + 1
        layout = torch.channels_last if channels_last else torch.contiguous_format
        out = out[:, :, :high, :wide].contiguous(memory_format=layout)
    return out


PATHS.register(
    ArithmeticPath(
        name="fp8_conv",
        help="two-dimensional convolutions: E4M3 by E4M3 on tensor cores",
        rank=20,
        fits=fits,
        available=lambda hardware, dtype: hardware.convolves_fp8 and dtype == torch.bfloat16,
        run=run,
        takes=lambda x: x.ndim == 4 and kernels_run_for(x),  # an image without its batch, or another current device
    )
)
