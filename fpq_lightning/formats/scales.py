"""Formats of block scales: the numbers that the scale of a group of weights may be.

* ``float8_e4m3fn``: an E4M3 number times one float32 number of the tensor, as in NVFP4 (groups of 16).
* ``float8_e8m0fnu``: a power of two, as in MXFP4 (groups of 32; OCP Microscaling Formats 1.0).

The tensor's own scale is a power of two here. All products are exact then, in float32 as in bfloat16 and in whatever
order a reader multiplies, and it costs no precision: E4M3 spans 17 binades, and one of them is given up at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

FLOAT32 = "float32"
"""The name of scales that any positive float32 number may be."""


@dataclass(frozen=True)
class ScaleFormat:
    """Positive numbers, ascending with their codes.

    Attributes:
        name: of the type, as torch and ml_dtypes have it.
        dtype: of stored codes; E8M0 lies in bytes, which every reader of safetensors knows.
        codes: the smallest and the largest that are used: no zero, no NaN, and in E8M0 no subnormal float32 number.
        mantissa: bits of it.
        relative: whether a float32 scale of the tensor is a factor of all.
        shifts: how many codes away the search by output error looks.
    """

    name: str
    dtype: torch.dtype
    codes: tuple[int, int]
    mantissa: int
    relative: bool
    shifts: tuple[int, ...]

    @property
    def values(self) -> Tensor:
        """The value of every code that is used, ascending, float32."""
        return _values(self)

    def tensor_scale(self, largest: Tensor) -> Tensor:
        """The smallest power of two with which a block scale of `largest` can be represented; 1 if not `relative`."""
        if not self.relative:
            return torch.ones_like(largest)
        top = float(self.values[-1])
        scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest / top)[1])
        return torch.where(scale / 2 * top >= largest, scale / 2, scale)

    def floor(self, scale: Tensor) -> Tensor:
        """Codes (int64) of the largest numbers that do not exceed `scale`; the smallest code where none is."""
        above = torch.searchsorted(self.values.to(scale.device), scale.contiguous(), right=True)
        return (above - 1).clamp(min=0) + self.codes[0]

    def decode(self, codes: Tensor) -> Tensor:
        """Values (float32) of codes of any integer type; without a table, for codes may be on any device."""
        if self.dtype is torch.uint8:
            return (codes.int() << 23).view(torch.float32)  # the exponent field of float32 has the same bias
        return codes.to(torch.uint8).view(self.dtype).float()

    def has_mantissa(self, scale: Tensor) -> Tensor:
        """Whether float32 numbers have no more mantissa bits than those of the format."""
        return scale.view(torch.int32) & (2 ** (23 - self.mantissa) - 1) == 0

    def encode(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """What is stored of block scales.

        Args:
            scale: positive float32, `[out, groups]`.

        Returns:
            The codes in `dtype`, the shape of `scale`, and the float32 scale of the tensor, `[]`.

        Raises:
            ValueError: if a scale is no such number.
        """
        tensor_scale = self.tensor_scale(scale.amax())
        codes = self.floor(scale / tensor_scale)
        if not scale.is_meta and not torch.equal(self.decode(codes) * tensor_scale, scale):
            raise ValueError(f"the scales are not those of {self.name}")
        return codes.to(torch.uint8).view(self.dtype), tensor_scale


@lru_cache
def _values(fmt: ScaleFormat) -> Tensor:
    return fmt.decode(torch.arange(fmt.codes[0], fmt.codes[1] + 1))


SCALE_FORMATS = {
    fmt.name: fmt
    for fmt in (
        ScaleFormat("float8_e4m3fn", torch.float8_e4m3fn, (1, 0x7E), 3, relative=True, shifts=(-3, -2, -1, 0, 1)),
        ScaleFormat("float8_e8m0fnu", torch.uint8, (1, 0xFE), 0, relative=False, shifts=(-1, 0, 1)),
    )
}


def parse_scale_format(name: str) -> ScaleFormat | None:
    """Reads the name of a scale format; None for ``float32``.

    Raises:
        ValueError: if there is no such format.
    """
    if name == FLOAT32:
        return None
    if name not in SCALE_FORMATS:
        raise ValueError(f"unknown scale_format {name!r}: use {', '.join([FLOAT32, *SCALE_FORMATS])}")
    return SCALE_FORMATS[name]
