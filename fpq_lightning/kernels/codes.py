"""Reading packed codes in Triton kernels: bits to codes, codes to values."""

from __future__ import annotations

import triton
import triton.language as tl

from fpq_lightning.formats import FloatFormat, Format, IntFormat


def constants(fmt: Format) -> dict[str, int | float | bool]:
    """The compile-time arguments of `value_of`.

    ``WIDTH`` bits a code, ``MANTISSA`` of them the mantissa's (-1 for integers), the top one a sign if ``SIGNED``, and
    the power of two between the code's bits read as float32 and its value.

    Raises:
        TypeError: if the format is neither floating point nor integer.
    """
    if isinstance(fmt, IntFormat):
        return {"WIDTH": fmt.bits, "MANTISSA": -1, "SIGNED": fmt.signed, "MULTIPLIER": 1.0}
    if isinstance(fmt, FloatFormat):
        # Exponent and mantissa at their places in a float32 are the value times 2^(-126 - smallest exponent), that of
        # a subnormal too.
        multiplier = 2.0**126 * fmt.smallest_step * 2.0**fmt.mantissa
        return {"WIDTH": fmt.bits, "MANTISSA": fmt.mantissa, "SIGNED": fmt.signed, "MULTIPLIER": multiplier}
    raise TypeError(f"{fmt} has no codes that kernels read")


@triton.jit
def value_of(
    code, WIDTH: tl.constexpr, MANTISSA: tl.constexpr, SIGNED: tl.constexpr, MULTIPLIER: tl.constexpr
):  # fmt: skip
    """The float32 value of int32 codes."""
    if MANTISSA < 0:
        if SIGNED:
            code = code - ((code >> (WIDTH - 1)) << WIDTH)
        return code.to(tl.float32)
    if SIGNED:
        magnitude = (code & ((1 << (WIDTH - 1)) - 1)) << (23 - MANTISSA)
        bits = magnitude | ((code >> (WIDTH - 1)) << 31)
    else:
        bits = code << (23 - MANTISSA)
    return bits.to(tl.float32, bitcast=True) * MULTIPLIER
