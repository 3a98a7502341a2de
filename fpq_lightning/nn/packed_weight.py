"""Weights as packed codes, in files as in memory.

A weight is never kept decoded, so that it takes the bytes of its codes and no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fpq_lightning.formats.numbers import Format, parse_format
from fpq_lightning.formats.packing import pack, packed_length
from fpq_lightning.formats.scales import FLOAT32, SCALE_FORMATS, ScaleFormat
from fpq_lightning.kernels import ops
from fpq_lightning.nn.memo import Memo
from fpq_lightning.quantization.quantizer import ExactBuffers, Quantizer

NATIVE_TYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
"""Formats whose codes are those of a torch type; all others are stored as uint8."""


class PackedWeight(ExactBuffers):
    """The codes of a weight, or of a part of it, with their format and scales.

    Args:
        fmt: the number format.
        shape: `[out, in, ...]` of the weight.
        codes: packed rows `[out, bytes]`, uint8 or the native type of the format.
        scale: float32 `[1, 1]`, `[out, 1]` or `[out, groups]`: of the tensor, of each output channel, or of each
            group of consecutive weights of one.
        offset: value of code zero, float32 like `scale`; None means 0.

    Attributes:
        column: what the FP8 path made of the scales (`fp8.column_scale`).
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None

    def __init__(self, fmt: Format, shape: Sequence[int], codes: Tensor, scale: Tensor, offset: Tensor | None) -> None:
        super().__init__()
        self.format = fmt
        self.shape = tuple(shape)
        self.column = Memo()
        self.register_buffer("codes", codes)
        self._keep_scale(scale)
        self.register_buffer("offset", offset)

    def _keep_scale(self, scale: Tensor) -> None:
        self.register_buffer("scale", scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        self.column = Memo()
        super()._apply(fn, recurse)
        return self

    @staticmethod
    def of(quantizer: Quantizer, codes: Tensor, shape: Sequence[int]) -> PackedWeight:
        """Packs the codes of a quantizer.

        Args:
            quantizer: with one scale a row.
            codes: uint8 `[rows, n]`, rows of the granularity.
            shape: `[out, in, ...]` of the weight.
        """
        fmt = quantizer.format
        packed = pack(codes.reshape(shape[0], -1), fmt.bits).view(NATIVE_TYPES.get(fmt.name, torch.uint8))
        scale = quantizer.current_scale().detach()
        rows = 1 if scale.numel() == 1 else shape[0]
        offset = None if quantizer.offset is None else quantizer.offset.reshape(rows, -1)
        if quantizer.scale_format is not None:
            return BlockScaledWeight(fmt, shape, packed, scale.reshape(shape[0], -1), quantizer.scale_format)
        return PackedWeight(fmt, shape, packed, scale.reshape(rows, -1), offset)

    @staticmethod
    def empty(entry: Mapping[str, Any], shape: Sequence[int]) -> PackedWeight:
        """A weight without contents, on the meta device, from what `describe` said.

        Raises:
            ValueError: if it says what cannot be.
        """
        fmt = parse_format(entry["format"])
        out, n = shape[0], math.prod(shape[1:])
        rows, groups = entry["scales"]
        if not (groups >= 1 and n % groups == 0 and rows in (1, out) and (rows == out or groups == 1)):
            raise ValueError(f"scales [{rows}, {groups}] do not go with a weight of {out} rows of {n}")
        kind = NATIVE_TYPES.get(fmt.name, torch.uint8)
        codes = torch.empty(out, packed_length(n, fmt.bits), dtype=kind, device="meta")
        scale = torch.empty(rows, groups, dtype=torch.float32, device="meta")
        name = entry.get("scale_format", FLOAT32)
        if name != FLOAT32:
            if name not in SCALE_FORMATS or rows != out or entry["offset"]:
                raise ValueError(f"scales [{rows}, {groups}] of {name} do not go with a weight of {out} rows of {n}")
            return BlockScaledWeight(fmt, shape, codes, scale, SCALE_FORMATS[name])
        return PackedWeight(fmt, shape, codes, scale, torch.empty_like(scale) if entry["offset"] else None)

    def describe(self) -> dict[str, Any]:
        """Format, shape of the scales, and whether there is an offset: plain types."""
        return {
            "format": self.format.name,
            "scales": list(self.scale.shape),
            "offset": self.offset is not None,
        }

    @property
    def bytes(self) -> Tensor:
        """The packed rows as uint8."""
        return self.codes.view(torch.uint8)

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in, ...]`, float32 rounded to a type."""
        return ops.decode(self.codes, self.format, self.shape, self.scale, self.offset, dtype)


class BlockScaledWeight(PackedWeight):
    """A packed weight whose group scales have a format of their own; `scale` decodes them.

    Args:
        fmt: the number format.
        shape: `[out, in, ...]` of the weight.
        codes: as of `PackedWeight`.
        scale: float32 `[out, groups]`, numbers of `scale_format`.
        scale_format: of the scales.

    Attributes:
        block_scale: codes of the scales, `[out, groups]`, in the type of the scale format.
        tensor_scale: float32 `[]`, a factor of all scales; None where the format has none.

    Raises:
        ValueError: if a scale is not of the format.
    """

    block_scale: Tensor
    tensor_scale: Tensor | None

    def __init__(
        self, fmt: Format, shape: Sequence[int], codes: Tensor, scale: Tensor, scale_format: ScaleFormat
    ) -> None:
        self.scale_format = scale_format
        super().__init__(fmt, shape, codes, scale, None)

    def _keep_scale(self, scale: Tensor) -> None:
        block_scale, tensor_scale = self.scale_format.encode(scale)
        self.register_buffer("block_scale", block_scale)
        self.register_buffer("tensor_scale", tensor_scale if self.scale_format.relative else None)

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The scales that the values are multiplied by, float32 `[out, groups]`."""
        scale = self.scale_format.decode(self.block_scale.view(torch.uint8))
        return scale if self.tensor_scale is None else scale * self.tensor_scale

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "scale_format": self.scale_format.name}
