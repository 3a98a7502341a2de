"""The arithmetic of packed weights as torch operators, so that `torch.compile` takes them as they are.

Eager calls go to a kernel directly, without the work of an operator; where there is none, plain torch decodes.
Tables of formats stay within the operators: compilers take but one constant from a function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpq_lightning.formats.numbers import Format, parse_format
from fpq_lightning.kernels import reference
from fpq_lightning.kernels.availability import kernels_run_for


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

    return weight_gemm(x, codes, parse_format(fmt), scale, bias)


@_weight_gemm.register_fake
def _(x: Tensor, codes: Tensor, fmt: str, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def decode(
    codes: Tensor, fmt: Format, shape: Sequence[int], scale: Tensor, offset: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See `fpq_lightning.kernels.decode.decode`; codes may also be of the torch type of their format."""
    # A compiler fuses the plain operations of native codes.
    if codes.dtype != torch.uint8 and (torch.compiler.is_compiling() or not kernels_run_for(codes)):
        return reference.apply_scales(codes.float(), shape, scale, offset, dtype)
    codes = codes.view(torch.uint8)
    if torch.compiler.is_compiling():
        return torch.ops.fpq.decode(codes, fmt.name, list(shape), scale, offset, dtype)  # type: ignore[no-any-return]
    if not kernels_run_for(codes):
        return reference.decode(codes, fmt, shape, scale, offset, dtype)

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
    table = None if fmt == reference.E4M3 else reference.e4m3_codes(fmt.name, codes.device)
    if not kernels_run_for(codes):
        return reference.translate(codes, fmt.bits, table, n, taps)

    from fpq_lightning.kernels import decode as kernel  # needs Triton

    return kernel.translate(codes, fmt.bits, table, n, taps)


def conv(
    x: Tensor, weight: Tensor, scale: Tensor, factor: Tensor, bias: Tensor | None, stride: int,
    padding: tuple[int, int], dtype: torch.dtype, channels_last: bool = True,
) -> Tensor:  # fmt: skip
    """See `fpq_lightning.kernels.conv.conv`; compilers know the result with `channels_last` alone."""
    if torch.compiler.is_compiling():
        return torch.ops.fpq.conv(x, weight, scale, factor, bias, stride, padding, dtype)  # type: ignore[no-any-return]

    from fpq_lightning.kernels import conv as kernel  # needs Triton

    return kernel.conv(x, weight, scale, factor, bias, stride, padding, dtype, channels_last)


def weight_gemm(x: Tensor, codes: Tensor, fmt: Format, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `fpq_lightning.kernels.weight_gemm.weight_gemm`."""
    if torch.compiler.is_compiling():
        return torch.ops.fpq.weight_gemm(x, codes, fmt.name, scale, bias)  # type: ignore[no-any-return]

    from fpq_lightning.kernels import weight_gemm as kernel  # needs Triton

    return kernel.weight_gemm(x, codes, fmt, scale, bias)


# --- learning ------------------------------------------------------------------------------------------------------


def fake_quantize(x: Tensor, scale: Tensor, offset: Tensor | None, fmt: Format) -> Tensor:
    """Quantizes and dequantizes: the value of ``fmt`` nearest to ``(x - offset) / scale``, placed back.

    The gradient is straight through inside the range and zero outside; that of the scale is LSQ's (Esser et al. 2020):
    ``value - x / scale`` inside the range and the bound outside.

    Args:
        x: any shape, float32, float16 or bfloat16.
        scale: float32, broadcastable to `x`.
        offset: the value of code zero, float32 like `scale`, or None.
        fmt: the number format.

    Returns:
        The shape and dtype of `x`.
    """
    # A compiler fuses the plain operations with what surrounds them.
    if not torch.compiler.is_compiling() and scale.numel() == 1 and kernels_run_for(x):
        from fpq_lightning.kernels import fake_quantize as kernel  # needs Triton

        return kernel.fake_quantize(x, scale, offset, fmt.spacing)
    return reference.fake_quantize(x, scale, offset, fmt)


def rounded_weight(
    v: Tensor, scale: Tensor, base: Tensor, step: Tensor, offset: Tensor | None, hardness: Tensor | float,
    low: float, high: float, sensitivity: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``offset + scale * clamp((base + up) * step, low, high)``: a weight whose rounding is being learned.

    ``up`` is h(V), or with `hardness` 1 the decision ``V >= 0`` with the gradient of h(V).

    Args:
        v: rounding variables, float32 `[n_rows, row_length]`.
        scale: float32 `[n_rows, 1]` or one value; differentiable like `v`.
        base: magnitudes rounded down to the grid, in steps, like `v`.
        step: signed step of each weight's binade, like `v`.
        offset: float32 like `scale`, or None.
        hardness: 0 or 1, one value.
        low: smallest value of the format.
        high: largest value of the format.
        sensitivity: what V is divided by, like `v`, or None.
    """
    if sensitivity is None and isinstance(hardness, Tensor) and kernels_run_for(v):
        from fpq_lightning.kernels import learned_rounding as kernel  # needs Triton

        return kernel.rounded_weight(v, scale, base, step, offset, hardness, low, high)
    return reference.rounded_weight(v, scale, base, step, offset, hardness, low, high, sensitivity)


def rounding_regulariser(v: Tensor, beta: Tensor, sensitivity: Tensor | None = None) -> Tensor:
    """Mean of ``1 - |2 h(V) - 1|^beta`` (AdaRound, equation 24); arguments as in `rounded_weight`."""
    if sensitivity is None and kernels_run_for(v):
        from fpq_lightning.kernels import learned_rounding as kernel  # needs Triton

        return kernel.regulariser(v, beta)
    return reference.rounding_regulariser(reference.rectified_sigmoid(v, sensitivity), beta)


# --- activations ---------------------------------------------------------------------------------------------------


def round_to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """E4M3 values nearest to ``x * (1 / scale)``, ties to even, saturating.

    Args:
        x: any shape, float32, float16 or bfloat16.
        scale: one float32 value.

    Returns:
        float8_e4m3fn of the shape of `x`, contiguous.
    """
    if not torch.compiler.is_compiling() and scale.numel() == 1 and kernels_run_for(x):
        from fpq_lightning.kernels import quantize as kernel  # needs Triton

        return kernel.quantize(x, scale)
    return reference.round_to_e4m3(x, scale)


def round_pixels_to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """`round_to_e4m3` of images `[b, channels, height, width]` to `[b, height, width, channels]`, contiguous."""
    if kernels_run_for(x):
        from fpq_lightning.kernels import quantize as kernel  # needs Triton

        return kernel.quantize_pixels(x, scale)
    return reference.round_to_e4m3(x.permute(0, 2, 3, 1), scale)


# --- rounding of columns -------------------------------------------------------------------------------------------

MAX_COLUMNS = 128
"""Columns that are rounded in one call."""


def descend_columns(q: Tensor, gradient: Tensor, hessian: Tensor, scale: Tensor, offset: Tensor, fmt: Format) -> Tensor:
    """Rounds columns in turn to ``q_j + gradient_j / H_jj``, the best grid value given all other columns.

    Args:
        q: grid values, float32 `[out, n]`, at most `MAX_COLUMNS`.
        gradient: ``(target - q) H``, float32 `[out, n]`.
        hessian: H of these columns, float32 `[groups, n, n]`; the channels of a group lie next to each other.
        scale: of each weight, float32 `[out, n]`.
        offset: likewise.
        fmt: the number format.

    Returns:
        Grid values, float32 `[out, n]`.
    """
    if kernels_run_for(q):
        from fpq_lightning.kernels import column_rounding as kernel  # needs Triton

        return kernel.descend_columns(q, gradient, hessian, scale, offset, fmt.spacing)
    return reference.descend_columns(q, gradient, hessian, scale, offset, fmt)


def compensate_columns(
    left: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, fmt: Format
) -> tuple[Tensor, Tensor]:
    """Rounds columns in turn and takes the error of each out of the later ones (GPTQ, arXiv 2210.17323).

    Args:
        left: weights, float32 `[out, n]`, at most `MAX_COLUMNS`.
        factor: of these columns, of the upper Cholesky factor of the inverse Hessian, float32 `[groups, n, n]`.
        scale: of each weight, float32 `[out, n]`.
        offset: likewise.
        fmt: the number format.

    Returns:
        Grid values, and errors relative to the diagonal of the factor, both float32 `[out, n]`.
    """
    if kernels_run_for(left):
        from fpq_lightning.kernels import column_rounding as kernel  # needs Triton

        return kernel.compensate_columns(left, factor, scale, offset, fmt.spacing)
    return reference.compensate_columns(left, factor, scale, offset, fmt)
