"""Packed weights to plain ones in one pass over memory; bit-equal to `PackedWeight.forward`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpq_lightning.formats.numbers import Format
from fpq_lightning.kernels.codes import constants, value_of
from fpq_lightning.kernels.launch import Launcher

_BLOCK = 1024
_BLOCK_WORDS = 128
_BLOCK_FOUR_BITS = 512  # words: four a thread, whole memory transactions


@triton.jit
def _code_at(row_ptr, column, inside, WIDTH: tl.constexpr):
    """The codes at columns of a packed row, int32."""
    bit = column * WIDTH
    code = tl.load(row_ptr + (bit >> 3), mask=inside, other=0).to(tl.int32)
    if 8 % WIDTH != 0:  # it may go on in the next byte
        beyond = inside & ((bit & 7) + WIDTH > 8)
        code |= tl.load(row_ptr + (bit >> 3) + 1, mask=beyond, other=0).to(tl.int32) << 8
    return (code >> (bit & 7)) & ((1 << WIDTH) - 1)


@triton.jit
def _decode(
    codes_ptr, scale_ptr, offset_ptr, out_ptr, n, row_bytes, scale_stride, group,
    HAS_OFFSET: tl.constexpr, WIDTH: tl.constexpr, MANTISSA: tl.constexpr, SIGNED: tl.constexpr,
    MULTIPLIER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    value = value_of(_code_at(codes_ptr + row * row_bytes, column, inside, WIDTH), WIDTH, MANTISSA, SIGNED, MULTIPLIER)
    at = row * scale_stride + column // group
    value = value * tl.load(scale_ptr + at, mask=inside, other=1.0)
    if HAS_OFFSET:
        value = value + tl.load(offset_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + row * n + column, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _translate(
    codes_ptr, table_ptr, out_ptr, n, row_bytes, WIDTH: tl.constexpr, TAPS: tl.constexpr, BLOCK_TAPS: tl.constexpr,
    LOOK_UP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    tap = tl.arange(0, BLOCK_TAPS)[:, None]
    inside = (channel < n) & (tap < TAPS)
    code = _code_at(codes_ptr + row * row_bytes, channel * TAPS + tap, inside, WIDTH)
    if LOOK_UP:
        code = tl.load(table_ptr + code, mask=inside, other=0)
    tl.store(out_ptr + (row * TAPS + tap) * n + channel, code.to(tl.uint8), mask=inside)


@triton.jit
def _translate_four_bits(words_ptr, table_ptr, out_ptr, n, BLOCK: tl.constexpr):
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # of eight codes
    codes = tl.load(words_ptr + word, mask=word < n, other=0)
    low, high = tl.zeros_like(codes), tl.zeros_like(codes)
    for i in tl.static_range(4):
        low |= tl.load(table_ptr + ((codes >> (4 * i)) & 15)).to(tl.int32) << (8 * i)
        high |= tl.load(table_ptr + ((codes >> (4 * i + 16)) & 15)).to(tl.int32) << (8 * i)
    at = tl.program_id(0).to(tl.int64) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    tl.store(out_ptr + at, tl.join(low, high).reshape(2 * BLOCK), mask=at < 2 * n)


@triton.jit
def _reorder(words_ptr, out_ptr, n, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * n * TAPS
    four = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # channels, of which a word has a byte each
    inside = four < n
    words = ()
    for i in tl.static_range(TAPS):
        words += (tl.load(words_ptr + row + four * TAPS + i, mask=inside, other=0),)  # type: ignore[assignment]
    for tap in tl.static_range(TAPS):
        word = words[tap // 4] >> (tap % 4 * 8) & 255
        for i in tl.static_range(1, 4):
            word |= (words[(i * TAPS + tap) // 4] >> ((i * TAPS + tap) % 4 * 8) & 255) << (i * 8)
        tl.store(out_ptr + row + tap * n + four, word, mask=inside)


def decode(
    codes: Tensor, fmt: Format, shape: Sequence[int], scale: Tensor, offset: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """A weight from its codes.

    Args:
        codes: uint8 `[out, bytes]`, packed rows.
        fmt: the number format.
        shape: `[out, in, ...]` of the weight.
        scale: float32 `[1, 1]`, `[out, 1]` or `[out, groups]`.
        offset: float32 like `scale`, or None.
        dtype: float32, float16 or bfloat16; the float32 weight is rounded to it.

    Returns:
        `shape`, contiguous.
    """
    n = math.prod(shape[1:])
    out = torch.empty(tuple(shape), dtype=dtype, device=codes.device)
    per_row = scale.shape[1] if scale.shape[0] > 1 or shape[0] == 1 else 0
    _decoder(fmt, offset is not None)(
        (shape[0], -(-n // _BLOCK), 1), codes, scale, scale if offset is None else offset, out, n, codes.shape[1],
        per_row, n // scale.shape[1],
    )  # fmt: skip
    return out


@lru_cache(maxsize=64)
def _decoder(fmt: Format, has_offset: bool) -> Launcher:
    return Launcher(_decode, HAS_OFFSET=has_offset, **constants(fmt), BLOCK=_BLOCK, enable_fp_fusion=False)


def translate(codes: Tensor, width: int, table: Tensor | None, n: int, taps: int = 1) -> Tensor:
    """Packed codes of one format to the codes of another, a byte each.

    Args:
        codes: uint8 `[rows, bytes]`, packed rows of codes `[n, taps]`.
        width: bits of a code.
        table: uint8 `[2^width]`, the new code of every code; None leaves them as they are.
        n: input channels of a row.
        taps: places of the filter of a convolution.

    Returns:
        uint8 `[rows, taps * n]`, the channels of a place next to each other.
    """
    out = torch.empty(codes.shape[0], taps * n, dtype=torch.uint8, device=codes.device)
    aligned = codes.data_ptr() % 4 == 0 and codes.storage_offset() % 4 == 0
    if width == 4 and table is not None and taps * n % 8 == 0 and (taps == 1 or n % 4 == 0) and aligned:
        words = out.numel() // 8
        grid = -(-words // _BLOCK_FOUR_BITS), 1, 1
        _launch_four_bits(grid, codes.view(torch.int32), table, out.view(torch.int32), words)
        return out if taps == 1 else translate(out, 8, None, n, taps)
    if width == 8 and table is None and n % 4 == 0 and aligned:
        grid = codes.shape[0], -(-n // (4 * _BLOCK_WORDS)), 1
        _reorderer(taps)(grid, codes.view(torch.int32), out.view(torch.int32), n // 4)
        return out
    block = max(64, _BLOCK >> (taps - 1).bit_length())
    _translator(width, taps, table is not None, block)(
        (codes.shape[0], -(-n // block), 1), codes, codes if table is None else table, out, n, codes.shape[1]
    )
    return out


_launch_four_bits = Launcher(_translate_four_bits, BLOCK=_BLOCK_FOUR_BITS)


@lru_cache(maxsize=64)
def _translator(width: int, taps: int, look_up: bool, block: int) -> Launcher:
    places = triton.next_power_of_2(taps)
    return Launcher(_translate, WIDTH=width, TAPS=taps, BLOCK_TAPS=places, LOOK_UP=look_up, BLOCK=block)


@lru_cache(maxsize=16)
def _reorderer(taps: int) -> Launcher:
    return Launcher(_reorder, TAPS=taps, BLOCK=_BLOCK_WORDS)
