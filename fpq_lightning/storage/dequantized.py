"""The dequantized form: float32 weights on the low-bit grid, and activation formats in ``quantization.json``.

`DiffusionPipeline.from_pretrained` opens it without this package, with full-precision activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpq_lightning.nn.attention import OPERANDS, packed_attention
from fpq_lightning.nn.calibrated import LayerQuantization, is_quantizable
from fpq_lightning.nn.convert import make_attention_quantized, make_quantized
from fpq_lightning.nn.packed_layer import packed_layers
from fpq_lightning.quantization.quantizer import Granularity, Quantizer
from fpq_lightning.storage.layers import check_scales
from fpq_lightning.utils.reading import read_json

FILE = "quantization.json"
FORMAT_VERSION = 1

ONLY = ""
"""The name of a pipeline's only denoiser, which its file does not tell."""


def describe(denoisers: Mapping[str, nn.Module], details: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``quantization.json``.

    Args:
        denoisers: by component, or an `ONLY` one; their quantized layers and attention are packed.
        details: where they come from.

    Returns:
        For each layer its parts, weight formats and input quantizers; for attention the quantizers of its operands.
        Those of several denoisers are under ``denoisers``.
    """
    described = {"format_version": FORMAT_VERSION, **details}
    if list(denoisers) == [ONLY]:
        return {**described, **_describe_one(denoisers[ONLY])}
    own = details.get("denoisers", {})
    return {**described, "denoisers": {n: {**own.get(n, {}), **_describe_one(one)} for n, one in denoisers.items()}}


def _describe_one(denoiser: nn.Module) -> dict[str, Any]:
    layers = {
        name: {
            "splits": list(layer.splits),
            "weights": [weight.format.name for weight in layer.weights],
            "inputs": [_describe(q) for q in layer.inputs],
        }
        for name, layer in packed_layers(denoiser).items()
    }
    attention = {name: [_describe(q) for q in module.operands] for name, module in packed_attention(denoiser).items()}
    return {"layers": layers, "attention": attention} if attention else {"layers": layers}


def _describe(quantizer: Quantizer) -> dict[str, Any]:
    state = quantizer.to_state()
    del state["scale_format"]  # of weights alone
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in state.items()}


def read_descriptions(directory: Path) -> dict[str, dict[str, Any]]:
    """Reads `quantization.json`: what it says of each denoiser, by component, or of the `ONLY` one.

    Raises:
        ValueError: if it is damaged or of another version.
    """
    file = directory / FILE
    try:
        shared = read_json(file)
        several = shared.pop("denoisers", {ONLY: {}})
        found = {name: {**shared, **own} for name, own in several.items()}
        versions = [(one["format_version"], one["layers"])[0] for one in found.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): quantize the model again") from error
    if wrong := [version for version in versions if version != FORMAT_VERSION]:
        raise ValueError(f"{file} has format version {wrong[0]}; this fpq_lightning reads version {FORMAT_VERSION}")
    return found


def apply_inputs(denoiser: nn.Module, description: Mapping[str, Any]) -> None:
    """Makes a denoiser, whose weights lie on the grid already, quantize its activations.

    Raises:
        ValueError: if the description does not fit the model.
    """
    modules = dict(denoiser.named_modules())
    try:
        for name, entry in description["layers"].items():
            if name not in modules:
                raise ValueError(f"it names a layer {name} that the model lacks")
            if not is_quantizable(modules[name]):
                raise ValueError(f"it names {name}, which is no Linear or Conv layer of the model")
            _apply_inputs(modules[name], name, entry)
        for name, operands in description.get("attention", {}).items():
            if name not in modules or is_quantizable(modules[name]):
                raise ValueError(f"it names {name}, which is no attention module of the model")
            _apply_operands(modules[name], name, operands)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{FILE} does not fit the model ({type(error).__name__}: {error}): quantize it again"
        ) from error


def _apply_inputs(layer: nn.Module, name: str, entry: Mapping[str, Any]) -> None:
    quantized = make_quantized(layer, Granularity("tensor"), entry["splits"])
    inputs = _read_quantizers(f"{name}.inputs", entry["inputs"])
    if len(inputs) not in (0, len(quantized.splits)):
        raise ValueError(f"{len(inputs)} input quantizers for {len(quantized.splits)} parts of the input")
    quantized.variants["quantized"] = LayerQuantization(inputs=inputs)
    quantized.set_mode("quantized")


def _apply_operands(module: nn.Module, name: str, entry: list[dict[str, Any]]) -> None:
    operands = _read_quantizers(f"{name}.operands", entry)
    if not operands or len(operands) % len(OPERANDS):
        raise ValueError(f"{len(operands)} quantizers for the attention of {name}, expected {len(OPERANDS)} a call")
    quantized = make_attention_quantized(module, name, len(operands) // len(OPERANDS))
    quantized.variants["quantized"] = LayerQuantization(inputs=operands)
    quantized.set_mode("quantized")


def _read_quantizers(name: str, entries: list[dict[str, Any]]) -> list[Quantizer]:
    """Quantizers from what `_describe` gave of each; the name is theirs in errors."""
    found = [
        Quantizer.from_state({k: _tensor(v) if k in ("scale", "offset") else v for k, v in entry.items()})
        for entry in entries
    ]
    check_scales({f"{name}.{i}": quantizer for i, quantizer in enumerate(found)})
    return found


def _tensor(value: Any) -> Tensor | None:
    return None if value is None else torch.tensor(value, dtype=torch.float32)
