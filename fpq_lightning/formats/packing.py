"""Codes of a few bits each, packed into bytes without gaps.

A row of codes is a stream of bits: code i of width w takes the bits ``i * w`` to ``(i + 1) * w``, its lowest bit first,
and bit k of the stream is bit ``k % 8`` (of value ``2^(k % 8)``) of byte ``k // 8``. So 4-bit codes lie two in a byte,
the first in the low half; 6-bit codes four in three bytes; 8-bit codes are bytes. Every row starts on a byte of its
own, and the bits left in its last byte are zero.
"""

from __future__ import annotations

import math

from torch import Tensor, nn


def packed_length(n: int, width: int) -> int:
    """Bytes of a row of `n` codes."""
    return -(-n * width // 8)


def _places(width: int) -> tuple[int, int, list[tuple[int, int]]]:
    """Codes and bytes of the shortest unit of whole bytes, and the byte and bit at which each of its codes begins."""
    n_codes = 8 // math.gcd(8, width)
    return n_codes, n_codes * width // 8, [divmod(i * width, 8) for i in range(n_codes)]


def pack(codes: Tensor, width: int) -> Tensor:
    """Packs rows of codes.

    Args:
        codes: uint8 `[rows, n]`.
        width: bits of a code, 1 to 8.

    Returns:
        uint8 `[rows, ceil(n * width / 8)]`.

    Raises:
        ValueError: if a code has more than `width` bits.
    """
    rows, n = codes.shape
    if codes.numel() and int(codes.max()) >= 2**width:
        raise ValueError(f"a code is {int(codes.max())}, which does not fit {width} bits")
    if width == 8:
        return codes.clone()
    n_codes, n_bytes, places = _places(width)
    n_units = -(-n // n_codes)
    units = nn.functional.pad(codes, (0, n_units * n_codes - n)).reshape(rows, n_units, n_codes)
    packed = codes.new_zeros(rows, n_units, n_bytes)
    for i, (byte, bit) in enumerate(places):
        packed[..., byte] |= units[..., i] << bit  # the shift drops what goes beyond the byte
        if bit + width > 8:
            packed[..., byte + 1] |= units[..., i] >> (8 - bit)
    return packed.flatten(1)[:, : packed_length(n, width)].contiguous()


def unpack(packed: Tensor, width: int, n: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        packed: uint8 `[rows, ceil(n * width / 8)]`.
        width: bits of a code, 1 to 8.
        n: codes of a row.

    Returns:
        uint8 `[rows, n]`; with 8 bits `packed` itself.

    Raises:
        ValueError: if the rows are not as long as `n` codes are.
    """
    rows, length = packed.shape
    if length != packed_length(n, width):
        raise ValueError(f"rows of {length} bytes, but {n} codes of {width} bits take {packed_length(n, width)}")
    if width == 8:
        return packed
    n_codes, n_bytes, places = _places(width)
    n_units = -(-n // n_codes)
    units = nn.functional.pad(packed, (0, n_units * n_bytes - length)).reshape(rows, n_units, n_bytes)
    codes = packed.new_empty(rows, n_units, n_codes)
    for i, (byte, bit) in enumerate(places):
        code = units[..., byte] >> bit
        if bit + width > 8:
            code = code | units[..., byte + 1] << (8 - bit)
        codes[..., i] = code & (2**width - 1)
    return codes.flatten(1)[:, :n]
