"""Packed codes to values, and to codes of E4M3, in plain torch; kernels do the same in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fpq_lightning.constants import kept
from fpq_lightning.formats import Format, parse_format
from fpq_lightning.packing import unpack

E4M3 = parse_format("float8_e4m3fn")


@kept
def values_of(fmt: str, device: torch.device) -> Tensor:
    """The value of every code of a format, float32 `[2^bits]`."""
    return parse_format(fmt).values.to(device)


@kept
def e4m3_codes(fmt: str, device: torch.device) -> Tensor:
    """The E4M3 code of the value of every code of a format, uint8 `[2^bits]`."""
    return E4M3.encode(parse_format(fmt).values.nan_to_num()).to(device)


def decode(
    codes: Tensor, fmt: Format, shape: Sequence[int], scale: Tensor, offset: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """A weight from its packed codes; arguments as of `fpq_lightning.kernels.decode.decode`."""
    indices = unpack(codes, fmt.bits, math.prod(shape[1:])).flatten().int()
    return scaled(values_of(fmt.name, codes.device).index_select(0, indices), shape, scale, offset, dtype)


def scaled(
    values: Tensor, shape: Sequence[int], scale: Tensor, offset: Tensor | None, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """Values times scales plus offsets, float32 rounded to a type."""
    weight = values.reshape(shape[0], scale.shape[1], -1) * scale[..., None]
    if offset is not None:
        weight = weight + offset[..., None]
    return weight.reshape(tuple(shape)).to(dtype)


def translate(codes: Tensor, width: int, table: Tensor | None, n: int, taps: int) -> Tensor:
    """Packed codes of one format to those of another; as of `fpq_lightning.kernels.decode.translate`."""
    found = unpack(codes, width, n * taps)
    found = found if table is None else table[found.int()]
    return found.reshape(len(codes), n, taps).transpose(1, 2).reshape(len(codes), -1)
