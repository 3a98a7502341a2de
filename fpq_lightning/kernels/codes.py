"""Reading packed codes in Triton kernels: bits to codes, codes to values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from fpq_lightning.formats.numbers import FloatFormat, Format, IntFormat


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


def four_bit_assembly(fmt: Format) -> str:
    """PTX that turns four bytes of two codes each into bfloat16: the low codes of the bytes, then the high ones.

    The byte permutation of the GPU is a table of eight bytes that is looked up four times at once: one for the low
    bytes of the magnitudes, one for the high bytes. The sign of a code makes it repeat the sign of what it picks. About
    two instructions a code.

    Returns:
        The instructions; empty where codes are not sign and magnitude.
    """
    if not (isinstance(fmt, FloatFormat) and fmt.bits == 4 and fmt.signed and not fmt.reserved):
        return ""
    magnitudes = fmt.values[:8].to(torch.bfloat16).view(torch.int16).tolist()
    low = [f"0x{_word(x & 0xFF for x in half):08X}" for half in (magnitudes[:4], magnitudes[4:])]
    high = [f"0x{_word(x >> 8 for x in half):08X}" for half in (magnitudes[:4], magnitudes[4:])]
    return f"""{{
    .reg .b32 m0, m1, l0, l1, h0, h1, s0, s1;
    and.b32 m0, $4, 0x77777777;
    shr.u32 m1, m0, 16;
    shr.u32 s1, $4, 16;
    prmt.b32 l0, {low[0]}, {low[1]}, m0;
    prmt.b32 l1, {low[0]}, {low[1]}, m1;
    prmt.b32 h0, {high[0]}, {high[1]}, m0;
    prmt.b32 h1, {high[0]}, {high[1]}, m1;
    prmt.b32 s0, 0x80808080, 0x80808080, $4;
    prmt.b32 s1, 0x80808080, 0x80808080, s1;
    shl.b32 s0, s0, 7;
    shl.b32 s1, s1, 7;
    lop3.b32 h0, s0, 0x80808080, h0, 0xEA;
    lop3.b32 h1, s1, 0x80808080, h1, 0xEA;
    prmt.b32 $0, l0, h0, 0x6240;
    prmt.b32 $1, l1, h1, 0x6240;
    prmt.b32 $2, l0, h0, 0x7351;
    prmt.b32 $3, l1, h1, 0x7351;
}}"""


def _word(parts: Iterable[int]) -> int:
    """Four bytes as a number, the first lowest."""
    return sum(byte << 8 * i for i, byte in enumerate(parts))
