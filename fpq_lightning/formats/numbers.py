"""Number formats: which values exist, and the code of each.

A format is a value object at the *unit* scale. `fpq_lightning.quantization.quantizer` places it on a tensor (scale,
offset, granularity). To add a named format or a family, register it as those at the end of this file.

Two conventions for floating point (docs/formats.md has the value tables):

* **free**: every code is a finite number, as the quantization literature assumes
  (Kuzmin et al. 2022, "FP8 Quantization: The Power of the Exponent"). Named ``e4m3``, unsigned ``ue4m4``.
* **hardware**: the OCP / IEEE types that tensor cores multiply, some of whose top codes are NaN or Inf.
  Named as in torch and ml_dtypes, ``float8_e4m3fn``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fpq_lightning.utils.registry import Registry

_FLOAT32_EXPONENT_MASK = 0x7F800000


class Spacing(NamedTuple):
    """What decides the rounding to a format.

    Ties go to the even multiple of the step; without a mantissa, where the step is the number itself, to the even code.

    Attributes:
        low: smallest value.
        high: largest value.
        smallest_normal: the smallest number with the full mantissa.
        relative_step: step over binade, ``2^-mantissa``; 0 for integers, whose step is 1.
    """

    low: float
    high: float
    smallest_normal: float
    relative_step: float


@dataclass(frozen=True)
class Format(ABC):
    """A finite set of numbers with a code of `bits` bits (at most 8) for each of them.

    All tensors are float32 at the unit scale. Rounding is to the nearest value, ties to the even code.
    Outside the range there is one rule: overflow and infinities saturate.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that `parse_format` reads."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Width of a code."""

    @property
    @abstractmethod
    def max(self) -> float:
        """The largest value."""

    @property
    @abstractmethod
    def min(self) -> float:
        """The smallest (most negative) value."""

    @property
    @abstractmethod
    def smallest_step(self) -> float:
        """The distance between zero and its neighbour."""

    @abstractmethod
    def step(self, x: Tensor) -> Tensor:
        """The distance between the two grid values around each element of `x` (clamped to the range)."""

    @property
    @abstractmethod
    def spacing(self) -> Spacing:
        """What kernels need for rounding."""

    @abstractmethod
    def _code_values(self) -> list[float]:
        """The value of every code, NaN for a code that stands for no number."""

    @abstractmethod
    def _encode(self, q: Tensor) -> Tensor:
        """Codes (int64) of values that lie on the grid."""

    def quantize(self, x: Tensor) -> Tensor:
        """Rounds every element of a float32 tensor to the nearest value of the format; NaN stays NaN."""
        x = x.clamp(self.min, self.max)
        step = self.step(x)
        return (x / step).round_().mul_(step)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (uint8) of the nearest values.

        Raises:
            ValueError: if `x` holds NaN, which has no code.
        """
        if torch.isnan(x).any():
            raise ValueError(f"cannot encode NaN as {self.name}: check the tensor for non-finite values first")
        return self._encode(self.quantize(x.float())).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Values (float32) of uint8 `codes`; bit-equal to `quantize` of what was encoded."""
        return self.values.to(codes.device).index_select(0, codes.flatten().int()).reshape(codes.shape)

    @property
    def values(self) -> Tensor:
        """The value of every code, NaN for a code that stands for no number; float32 `[2^bits]`."""
        return _value_table(self)

    @property
    def grid(self) -> Tensor:
        """All distinct values in ascending order, float32 `[n]`."""
        return torch.unique(self.values[self.values.isfinite()] + 0.0)

    def __str__(self) -> str:
        return self.name


@lru_cache(maxsize=64)
def _value_table(fmt: Format) -> Tensor:
    return torch.tensor(fmt._code_values(), dtype=torch.float32)


@dataclass(frozen=True)
class FloatFormat(Format):
    """`exponent` + `mantissa` bits, subnormals, and a sign bit if `signed`.

    Attributes:
        exponent: number of exponent bits, 1 to 7 (8 would leave the range of float32).
        mantissa: number of mantissa bits, 0 allowed.
        signed: whether the top bit of the code is a sign.
        reserved: how many of the largest codes of each sign stand for NaN or Inf (0 in the free convention).
        hardware_name: name of the type in torch and ml_dtypes; empty in the free convention.
    """

    exponent: int
    mantissa: int
    signed: bool = True
    reserved: int = 0
    hardware_name: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.exponent <= 7 or self.mantissa < 0 or not 2 <= self.bits <= 8:
            raise ValueError(
                f"a float format needs 1 to 7 exponent bits and 2 to 8 bits in all, got E{self.exponent} "
                f"M{self.mantissa} {'signed' if self.signed else 'unsigned'}"
            )

    @property
    def name(self) -> str:
        return self.hardware_name or f"{'' if self.signed else 'u'}e{self.exponent}m{self.mantissa}"

    @property
    def bits(self) -> int:
        return self.exponent + self.mantissa + self.signed

    @property
    def _min_exponent(self) -> int:
        """Exponent of the smallest normal number; the IEEE bias 2^(E-1) - 1. A real-valued bias is in the scale."""
        return 2 - 2 ** (self.exponent - 1)

    def _magnitude(self, code: int) -> float:
        field, fraction = divmod(code, 2**self.mantissa)
        integer = fraction + (2**self.mantissa if field else 0)
        return integer * 2.0 ** (max(field, 1) - 1 + self._min_exponent - self.mantissa)

    @property
    def max(self) -> float:
        return self._magnitude(2 ** (self.exponent + self.mantissa) - 1 - self.reserved)

    @property
    def min(self) -> float:
        return -self.max if self.signed else 0.0

    @property
    def smallest_step(self) -> float:
        return 2.0 ** (self._min_exponent - self.mantissa)

    @cached_property
    def spacing(self) -> Spacing:
        return Spacing(self.min, self.max, 2.0**self._min_exponent, 2.0**-self.mantissa)

    def _binade(self, x: Tensor) -> Tensor:
        """2^floor(log2 |x|), at least the smallest normal number; from the bits, since log2 rounds."""
        bits = x.abs().contiguous().view(torch.int32).bitwise_and_(_FLOAT32_EXPONENT_MASK)
        return bits.view(torch.float32).clamp_(min=2.0**self._min_exponent)

    def step(self, x: Tensor) -> Tensor:
        return self._binade(x).mul_(2.0**-self.mantissa)

    def _binade_index(self, step: Tensor) -> Tensor:
        return (torch.frexp(step / self.smallest_step)[1] - 1).long()

    def quantize(self, x: Tensor) -> Tensor:
        if not self.signed:
            x = x.relu() + 0.0  # no negative zero
        if self.mantissa:
            return super().quantize(x)
        # Without mantissa bits every normal value is its own step, and twice the step has the next code. Whether a
        # code is even depends on the binade, not on the multiple of the step.
        x = x.clamp(self.min, self.max)
        step = self.step(x)
        multiple = x.abs() / step
        lower = multiple.floor()
        code = self._binade_index(step) + lower
        up = (multiple - lower > 0.5) | ((multiple - lower == 0.5) & (code % 2 == 1))
        return torch.copysign((lower + up) * step, x)

    def _encode(self, q: Tensor) -> Tensor:
        step = self.step(q)
        # A normal number m * step with field e has code e * 2^M + (m - 2^M); a subnormal one has code m.
        code = self._binade_index(step) * 2**self.mantissa + (q.abs() / step).long()
        return code + torch.signbit(q).long() * 2 ** (self.bits - 1) if self.signed else code

    def _code_values(self) -> list[float]:
        finite = 2 ** (self.exponent + self.mantissa) - self.reserved
        positive = [self._magnitude(c) for c in range(finite)] + [float("nan")] * self.reserved
        return positive + [-v for v in positive] if self.signed else positive


@dataclass(frozen=True)
class IntFormat(Format):
    """Integers of `width` bits: two's complement, or 0 to 2^width - 1 if unsigned (asymmetric with an offset)."""

    width: int
    signed: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 8:
            raise ValueError(f"an integer format needs 2 to 8 bits, got {self.width}")

    @property
    def name(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.width}"

    @property
    def bits(self) -> int:
        return self.width

    @property
    def max(self) -> float:
        return float(2 ** (self.width - self.signed) - 1)

    @property
    def min(self) -> float:
        return -self.max - 1 if self.signed else 0.0

    @property
    def smallest_step(self) -> float:
        return 1.0

    @cached_property
    def spacing(self) -> Spacing:
        return Spacing(self.min, self.max, 1.0, 0.0)

    def step(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)

    def quantize(self, x: Tensor) -> Tensor:
        return x.clamp(self.min, self.max).round_() + 0.0  # no negative zero: two's complement has none

    def _encode(self, q: Tensor) -> Tensor:
        return q.long() & (2**self.width - 1)

    def _code_values(self) -> list[float]:
        codes = range(2**self.width)
        return [float(c - 2**self.width if self.signed and c >= 2 ** (self.width - 1) else c) for c in codes]


@dataclass(frozen=True)
class Family:
    """One name for several formats, among which the search chooses one for each tensor.

    Attributes:
        name: of the family.
        members: names of its formats, all of one width.
    """

    name: str
    members: tuple[str, ...]


FORMATS: Registry[Format] = Registry("format")
"""Formats that have a name of their own. Names such as ``e4m3`` and ``int8`` spell out all others."""

FORMATS.register(FloatFormat(4, 3, reserved=1, hardware_name="float8_e4m3fn"))
FORMATS.register(FloatFormat(5, 2, reserved=4, hardware_name="float8_e5m2"))
FORMATS.register(FloatFormat(2, 3, hardware_name="float6_e2m3fn"))
FORMATS.register(FloatFormat(3, 2, hardware_name="float6_e3m2fn"))
FORMATS.register(FloatFormat(2, 1, hardware_name="float4_e2m1fn"))

FAMILIES: Registry[Family] = Registry("family")

FAMILIES.register(Family("fp8", ("e5m2", "e4m3", "e3m4", "e2m5")))
FAMILIES.register(Family("fp6", ("e3m2", "e2m3", "e4m1")))
FAMILIES.register(Family("fp4", ("e2m1", "e1m2", "e3m0")))
FAMILIES.register(Family("ufp8", ("ue5m3", "ue4m4", "ue3m5", "ue2m6")))
FAMILIES.register(Family("hardware_fp8", ("float8_e4m3fn",)))  # tensor cores do not multiply E5M2 by E5M2
FAMILIES.register(Family("hardware_fp6", ("float6_e2m3fn", "float6_e3m2fn")))
FAMILIES.register(Family("hardware_fp4", ("float4_e2m1fn",)))


def known_formats() -> str:
    """The names that `parse_formats` reads, for help and error messages."""
    return f"a name such as e4m3, ue4m4, int8, uint4, or one of {', '.join([*FAMILIES.names, *FORMATS.names])}"


def parse_format(name: str) -> Format:
    """Reads the name of one format.

    Args:
        name: ``e4m3`` (free), ``ue4m4`` (free, unsigned), ``int8``, ``uint8``, or a name in `FORMATS`.

    Raises:
        ValueError: if there is no such format.
    """
    if not isinstance(name, str):
        raise ValueError(f"a format is a name, got {name!r}")
    key = name.strip().lower()
    if key in FORMATS:
        return FORMATS[key]
    if match := re.fullmatch(r"(u?)e(\d)m(\d)", key):
        return FloatFormat(int(match[2]), int(match[3]), signed=not match[1])
    if match := re.fullmatch(r"(u?)int(\d)", key):
        return IntFormat(int(match[2]), signed=not match[1])
    raise ValueError(f"unknown format {name!r}: use {known_formats()}")


def parse_formats(names: str | Sequence[str]) -> tuple[Format, ...]:
    """Reads a format, a family or a list of either.

    Returns:
        The formats that the search may choose from, each once.

    Raises:
        ValueError: if a name is unknown or the formats differ in width.
    """
    formats: dict[Format, None] = {}
    for name in [names] if isinstance(names, str) else names:
        key = name.strip().lower()
        members = FAMILIES[key].members if key in FAMILIES else (name,)
        formats |= dict.fromkeys(parse_format(member) for member in members)
    if len({f.bits for f in formats}) != 1:
        raise ValueError(f"candidate formats must share one width, got {[f'{f} ({f.bits} bits)' for f in formats]}")
    return tuple(formats)
