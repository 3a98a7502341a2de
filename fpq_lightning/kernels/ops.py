"""The kernels of packed weights as torch operators, so that `torch.compile` takes them as they are.

Eager calls go to a kernel directly, without the work of an operator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpq_lightning.formats import Format, parse_format


@torch.library.custom_op("fpq::decode", mutates_args=())
def _decode(
    codes: Tensor, fmt: str, shape: Sequence[int], scale: Tensor, offset: Tensor | None, dtype: torch.dtype
) -> Tensor:
    from fpq_lightning.kernels.decode import decode  # needs Triton

    return decode(codes, parse_format(fmt), shape, scale, offset, dtype)


@_decode.register_fake
def _(
    codes: Tensor, fmt: str, shape: Sequence[int], scale: Tensor, offset: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(tuple(shape), dtype=dtype)


@torch.library.custom_op("fpq::translate", mutates_args=())
def _translate(codes: Tensor, width: int, table: Tensor, n: int) -> Tensor:
    from fpq_lightning.kernels.decode import translate

    return translate(codes, width, table, n)


@_translate.register_fake
def _(codes: Tensor, width: int, table: Tensor, n: int) -> Tensor:
    return codes.new_empty(codes.shape[0], n)


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
    from fpq_lightning.kernels import decode as kernel

    return kernel.decode(codes, fmt, shape, scale, offset, dtype)


def translate(codes: Tensor, width: int, table: Tensor, n: int) -> Tensor:
    """See `fpq_lightning.kernels.decode.translate`."""
    if torch.compiler.is_compiling():
        return torch.ops.fpq.translate(codes, width, table, n)  # type: ignore[no-any-return]
    from fpq_lightning.kernels import decode as kernel

    return kernel.translate(codes, width, table, n)


def weight_gemm(x: Tensor, codes: Tensor, fmt: Format, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `fpq_lightning.kernels.weight_gemm.weight_gemm`."""
    if torch.compiler.is_compiling():
        return torch.ops.fpq.weight_gemm(x, codes, fmt.name, scale, bias)  # type: ignore[no-any-return]
    from fpq_lightning.kernels import weight_gemm as kernel

    return kernel.weight_gemm(x, codes, fmt, scale, bias)
