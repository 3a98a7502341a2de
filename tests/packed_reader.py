"""A reader of the packed form, written from docs/format.md and docs/formats.md: numpy and JSON, none of the package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

_TYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "u1", "F8_E4M3": "u1", "F8_E5M2": "u1"}
_HARDWARE = {"float8_e4m3fn": (4, 3, 1), "float8_e5m2": (5, 2, 4), "float6_e2m3fn": (2, 3, 0)}
_HARDWARE |= {"float6_e3m2fn": (3, 2, 0), "float4_e2m1fn": (2, 1, 0)}  # exponent, mantissa, codes lost


def read_safetensors(file: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Type and contents of every tensor."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = entry["dtype"], np.frombuffer(data[begin:end], _TYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def values_of(name: str) -> np.ndarray:
    """The value of every code of a format."""
    if match := re.fullmatch(r"(u?)int(\d)", name):
        codes = np.arange(2 ** int(match[2]))
        return codes if match[1] else np.where(codes >= len(codes) // 2, codes - len(codes), codes)
    if name in _HARDWARE:
        (exponent, mantissa, lost), signed = _HARDWARE[name], True
    else:
        match = re.fullmatch(r"(u?)e(\d)m(\d)", name)
        assert match is not None, name
        exponent, mantissa, lost, signed = int(match[2]), int(match[3]), 0, not match[1]
    bias = 2 ** (exponent - 1) - 1
    positive = []
    for code in range(2 ** (exponent + mantissa)):
        e, f = code >> mantissa, code & (2**mantissa - 1)
        number = (2**mantissa + f) * 2.0 ** (e - bias - mantissa) if e else f * 2.0 ** (1 - bias - mantissa)
        positive.append(number if code < 2 ** (exponent + mantissa) - lost else np.nan)
    return np.array(positive + [-number for number in positive] if signed else positive)


def bits_of(name: str) -> int:
    return (len(values_of(name)) - 1).bit_length()


def unpack(rows: np.ndarray, width: int, n: int) -> np.ndarray:
    """Codes `[rows, n]` of packed bytes; the bits that are left must be zero."""
    bits = np.unpackbits(rows, axis=1, bitorder="little")
    assert not bits[:, n * width :].any()
    assert bits.shape[1] - n * width < 8
    codes = bits[:, : n * width].reshape(len(rows), n, width)
    return (codes.astype(np.int64) << np.arange(width)).sum(-1)


def read_scale(stored: dict[str, tuple[str, np.ndarray]], part: str, scale_format: str) -> np.ndarray:
    """The scales of a part, float32 `[rows, groups]`."""
    if scale_format == "float32":
        assert f"{part}.block_scale" not in stored
        return stored[f"{part}.scale"][1]
    assert f"{part}.scale" not in stored
    kind, codes = stored[f"{part}.block_scale"]
    if scale_format == "float8_e8m0fnu":
        assert kind == "U8"
        assert f"{part}.tensor_scale" not in stored
        return (2.0 ** (codes.astype(np.float64) - 127)).astype(np.float32)
    assert (kind, scale_format) == ("F8_E4M3", "float8_e4m3fn")
    tensor_scale = stored[f"{part}.tensor_scale"][1]
    assert tensor_scale.shape == ()
    return values_of(scale_format).astype(np.float32)[codes] * tensor_scale


def read_denoiser(directory: Path) -> dict[str, np.ndarray]:
    """A denoiser's tensors with weights in place of codes and scales; those of its inputs as they are."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fpq"
    assert config["format_version"] == 3
    stored = {k: v for file in directory.glob("*.safetensors") for k, v in read_safetensors(file).items()}
    tensors = {name: array for name, (_, array) in stored.items() if ".weights." not in name}
    for name, layer in config["layers"].items():
        out, parts = layer["shape"][0], []
        for p, (entry, size) in enumerate(zip(layer["weights"], layer["splits"], strict=False)):
            kind, codes = stored[f"{name}.weights.{p}.codes"]
            assert kind == {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}.get(entry["format"], "U8")
            scale = read_scale(stored, f"{name}.weights.{p}", entry.get("scale_format", "float32"))
            assert list(scale.shape) == entry["scales"]
            assert (scale > 0).all()
            shape = (out, size, *layer["shape"][2:])
            values = values_of(entry["format"]).astype(np.float32)
            decoded = values[unpack(codes, bits_of(entry["format"]), int(np.prod(shape[1:])))]
            part = decoded.reshape(out, scale.shape[1], -1) * scale[:, :, None]
            if entry["offset"]:
                part = part + stored[f"{name}.weights.{p}.offset"][1][:, :, None]
            parts.append(part.reshape(shape))
        if parts:
            tensors[f"{name}.weight"] = np.concatenate(parts, axis=1)
    return tensors
