"""Quantizers of inputs in packed files: their tensors are stored, and all else is described by plain types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fpq_lightning.formats.numbers import parse_format
from fpq_lightning.quantization.quantizer import Quantizer


def describe_quantizer(quantizer: Quantizer) -> dict[str, Any]:
    """All of a quantizer that is not in its tensors: plain types, which `empty_quantizer` reads."""
    return {
        "format": quantizer.format.name,
        "token_dims": list(quantizer.token_dims) if quantizer.scale is None else None,
        "offset": quantizer.offset is not None,
    }


def empty_quantizer(entry: Mapping[str, Any]) -> Quantizer:
    """A quantizer whose tensors are to be loaded, from what `describe_quantizer` said.

    Raises:
        ValueError: if it says what cannot be.
    """
    scale, offset = (torch.empty((), dtype=torch.float32, device="meta") for _ in range(2))
    dims = entry["token_dims"]
    if dims is not None and not all(isinstance(d, int) and abs(d) < 6 for d in dims):
        raise ValueError(f"token_dims {dims} are no dimensions")
    scales = (scale if dims is None else None, offset if entry["offset"] else None)
    return Quantizer(parse_format(entry["format"]), *scales, *(() if dims is None else (tuple(dims),)))
