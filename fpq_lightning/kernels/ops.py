"""The arithmetic of packed weights as torch operators, so that `torch.compile` takes them as they are.

Eager calls go to a kernel directly, without the work of an operator; where there is none, plain torch decodes.
Tables of formats stay within the operators: compilers take but one constant from a function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpq_lightning import decoding, kernels
from fpq_lightning.formats import Format, parse_format


@torch.library.custom_op("fpq::decode", mutates_args=())
def _decode(
    codes: Tensor, fmt: str, shape: Sequence[int], scale: Tensor, offset: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return decode(codes, parse_format(fmt), shape, scale, offset, dtype)


@_decode.register_fake
def _(
    codes: Tensor, fmt: str, shape: Sequence[int], scale: Tensor, offset: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(tuple(shape), dtype=dtype)


@torch.library.custom_op("fpq::translate", mutates_args=())
def _translate(codes: Tensor, fmt: str, n: int, taps: int) -> Tensor:
    return translate(codes, parse_format(fmt), n, taps)


@_translate.register_fake
def _(codes: Tensor, fmt: str, n: int, taps: int) -> Tensor:
    return codes.new_empty(codes.shape[0], taps * n)


@torch.library.custom_op("fpq::conv", mutates_args=())
def _conv(
    x: Tensor, weight: Tensor, scale: Tensor, factor: Tensor, bias: Tensor | None, stride: int,
    padding: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from fpq_lightning.kernels.conv import conv

    return conv(x, weight, scale, factor, bias, stride, (padding[0], padding[1]), dtype)


@_conv.register_fake
def _(
    x: Tensor, weight: Tensor, scale: Tensor, factor: Tensor, bias: Tensor | None, stride: int,
    padding: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    sizes = zip(x.shape[1:3], padding, weight.shape[1:3], strict=True)
    height, width = ((size + 2 * pad - taps) // stride + 1 for size, pad, taps in sizes)
    return x.new_empty(x.shape[0], height, width, weight.shape[0], dtype=dtype)


@torch.library.custom_op("fpq::weight_gemm", mutates_args=())
def _weight_gemm(x: Tensor, codes: Tensor, fmt: str, scale: Tensor, bias: Tensor | None) -> Tensor:
    from fpq_lightning.kernels.weight_gemm import weight_gemm

    return weight_gemm(x, codes, parse_format(fmt), scale, bias)


@_weight_gemm.register_fake
def _(x: Tensor, codes: Tensor, fmt: str, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def decode(
    codes: Tensor, fmt: Format, shape: Sequence[int], scale: Tensor, offset: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See `fpq_lightning.kernels.decode.decode`."""
    if torch.compiler.is_compiling():
        return torch.ops.fpq.decode(codes, fmt.name, list(shape), scale, offset, dtype)  # type: ignore[no-any-return]
    if not kernels.are_for(codes):
        return decoding.decode(codes, fmt, shape, scale, offset, dtype)
    from fpq_lightning.kernels import decode as kernel  # needs Triton

    return kernel.decode(codes, fmt, shape, scale, offset, dtype)


def translate(codes: Tensor, fmt: Format, n: int, taps: int = 1) -> Tensor:
    """Packed codes of a format whose values are E4M3's to codes of E4M3, a byte each.

    Args:
        codes: uint8 `[rows, bytes]`, packed rows of codes `[n, taps]`.
        fmt: their format.
        n: input channels of a row.
        taps: places of the filter of a convolution.

    Returns:
        uint8 `[rows, taps * n]`, the channels of a place next to each other.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fpq.translate(codes, fmt.name, n, taps)  # type: ignore[no-any-return]
    table = None if fmt == decoding.E4M3 else decoding.e4m3_codes(fmt.name, codes.device)
    if not kernels.are_for(codes):
        return decoding.translate(codes, fmt.bits, table, n, taps)
    from fpq_lightning.kernels import decode as kernel

    return kernel.translate(codes, fmt.bits, table, n, taps)


def conv(
    x: Tensor, weight: Tensor, scale: Tensor, factor: Tensor, bias: Tensor | None, stride: int,
    padding: tuple[int, int], dtype: torch.dtype, channels_last: bool = True,
) -> Tensor:  # fmt: skip
    """See `fpq_lightning.kernels.conv.conv`; compilers know the result with `channels_last` alone."""
    if torch.compiler.is_compiling():
        return torch.ops.fpq.conv(x, weight, scale, factor, bias, stride, padding, dtype)  # type: ignore[no-any-return]
    from fpq_lightning.kernels import conv as kernel

    return kernel.conv(x, weight, scale, factor, bias, stride, padding, dtype, channels_last)


def weight_gemm(x: Tensor, codes: Tensor, fmt: Format, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `fpq_lightning.kernels.weight_gemm.weight_gemm`."""
    if torch.compiler.is_compiling():
        return torch.ops.fpq.weight_gemm(x, codes, fmt.name, scale, bias)  # type: ignore[no-any-return]
    from fpq_lightning.kernels import weight_gemm as kernel

    return kernel.weight_gemm(x, codes, fmt, scale, bias)
