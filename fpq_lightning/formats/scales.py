"""Formats of block scales: the numbers that the scale of a group of weights may be.

* ``float8_e4m3fn``: an E4M3 number times one float32 number of the tensor, as in NVFP4 (groups of 16).
* ``float8_e8m0fnu``: a power of two, as in MXFP4 (groups of 32; OCP Microscaling Formats 1.0).

The scale of the tensor is always a power of two here. All products are then exact, in float32 and in bfloat16, in
whatever order a reader multiplies. This costs no precision: E4M3 spans 17 binades and loses one of them at most.

To add a scale format, register it as those at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fpq_lightning.utils.registry import Registry

FLOAT32 = "float32"
"""The name of scales that any positive float32 number may be."""


@dataclass(frozen=True)
class ScaleFormat:
    """Positive numbers that ascend with their codes of one byte.

    Attributes:
        name: of the type, as in torch and ml_dtypes.
        dtype: of stored codes.
        codes: the smallest and the largest code in use, without zero, NaN and subnormal float32 numbers.
        read: values (float32) of uint8 codes, on the device of the codes.
        relative: whether all scales of a tensor share one float32 factor.
        shifts: the search by output error tries the codes so many places away.
    """

    name: str
    dtype: torch.dtype
    codes: tuple[int, int]
    read: Callable[[Tensor], Tensor]
    relative: bool
    shifts: tuple[int, ...]

    @property
    def values(self) -> Tensor:
        """The values of all codes in use, ascending, float32."""
        return _values(self)

    def tensor_scale(self, largest: Tensor) -> Tensor:
        """The smallest power of two with which a block scale of `largest` can be represented; 1 if not `relative`."""
        if not self.relative:
            return torch.ones_like(largest)
        top = float(self.values[-1])
        scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest / top)[1])
        return torch.where(scale / 2 * top >= largest, scale / 2, scale)

    def floor(self, scale: Tensor) -> Tensor:
        """Codes (int64) of the largest numbers up to `scale`; the smallest code where all numbers are larger."""
        above = torch.searchsorted(self.values.to(scale.device), scale.contiguous(), right=True)
        return (above - 1).clamp(min=0) + self.codes[0]

    def decode(self, codes: Tensor) -> Tensor:
        """Values (float32) of codes of any integer type."""
        return self.read(codes.to(torch.uint8))

    def encode(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Block scales as they are stored.

        Args:
            scale: positive float32, `[out, groups]`.

        Returns:
            The codes in `dtype`, the shape of `scale`, and the float32 scale of the tensor, `[]`.

        Raises:
            ValueError: if a scale is not a number of the format.
        """
        tensor_scale = self.tensor_scale(scale.amax())
        codes = self.floor(scale / tensor_scale)
        if not scale.is_meta and not torch.equal(self.decode(codes) * tensor_scale, scale):
            raise ValueError(f"the scales are not those of {self.name}")
        return codes.to(torch.uint8).view(self.dtype), tensor_scale


@lru_cache
def _values(fmt: ScaleFormat) -> Tensor:
    return fmt.decode(torch.arange(fmt.codes[0], fmt.codes[1] + 1))


def _read_e4m3(codes: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float()


def _read_e8m0(codes: Tensor) -> Tensor:
    return (codes.int() << 23).view(torch.float32)  # the exponent of float32 has the same bias


SCALE_FORMATS: Registry[ScaleFormat] = Registry("scale_format")

SCALE_FORMATS.register(
    ScaleFormat("float8_e4m3fn", torch.float8_e4m3fn, (1, 0x7E), _read_e4m3, relative=True, shifts=(-3, -2, -1, 0, 1))
)
SCALE_FORMATS.register(  # stored as bytes, which every reader of safetensors knows
    ScaleFormat("float8_e8m0fnu", torch.uint8, (1, 0xFE), _read_e8m0, relative=False, shifts=(-1, 0, 1))
)


def known_scale_formats() -> str:
    """The names that `parse_scale_format` reads, for help and error messages."""
    return ", ".join([FLOAT32, *SCALE_FORMATS.names])


def parse_scale_format(name: str) -> ScaleFormat | None:
    """Reads the name of a scale format; None for ``float32``.

    Raises:
        ValueError: if there is no such format.
    """
    if name == FLOAT32:
        return None
    if name not in SCALE_FORMATS:
        raise ValueError(f"unknown scale_format {name!r}: use {known_scale_formats()}")
    return SCALE_FORMATS[name]
