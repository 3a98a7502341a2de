"""``quantized/``: a diffusers pipeline with float32 weights on the low-bit grid, activation formats beside them.

Plain `DiffusionPipeline.from_pretrained` opens it. `load_quantized` also applies the formats of activations and
attention.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor, nn

from fpq_lightning.attention import OPERANDS, make_attention_quantized, quantized_attention
from fpq_lightning.layers import (
    QUANTIZED_CLASSES,
    LayerQuantization,
    QuantizedLayer,
    is_quantizable,
    make_quantized,
    quantized_layers,
)
from fpq_lightning.pipelines import denoiser_name, load_pipeline
from fpq_lightning.quantizers import Granularity, Quantizer
from fpq_lightning.storage.files import whole_directory, write_json

FILE = "quantization.json"
FORMAT_VERSION = 1

_README = """# A quantized diffusion model

Made by fpq_lightning {version} from `{base_model}`.

The weights lie on a low-bit grid and are stored as float32, since half precision would move them off it;
`DiffusionPipeline.from_pretrained` opens this directory as it is, then with full-precision activations.
Activation formats and scales are in `{file}`; `fpq test --model DIR`, `fpq predict --model DIR --output OUT` and
`fpq_lightning.load_quantized(DIR)` apply them.
"""


@contextmanager
def as_plain(model: nn.Module) -> Iterator[None]:
    """Makes quantized layers plain ones with their quantized weights for a while, so that the model can be saved.

    Attention becomes that of the model.
    """
    before = {}
    attention = [(m, type(m), m._modules.pop("variants")) for m in quantized_attention(model).values()]
    quantized = quantized_layers(model)
    for name, layer in quantized.items():
        variants = cast(nn.ModuleDict, layer._modules.pop("variants"))
        before[name] = (type(layer), layer.weight, layer.bias, variants)
        if "learned" in variants:
            quantization = cast(LayerQuantization, variants["learned"])
            weight = layer.quantized_weight(quantization)
            layer.weight = nn.Parameter(weight.detach().float().clone(), requires_grad=False)
            if quantization.bias is not None:
                layer.bias = nn.Parameter(quantization.bias.detach().clone(), requires_grad=False)
    plain_classes = {cls: plain for plain, cls in QUANTIZED_CLASSES.items()}
    for layer in quantized.values():
        cast(Any, layer).__class__ = plain_classes[type(layer)]
    for module, quantized_class, _ in attention:
        cast(Any, module).__class__ = quantized_class.__bases__[1]
    try:
        yield
    finally:
        for name, layer in quantized.items():
            layer.__class__, layer.weight, layer.bias, variants = before[name]
            layer._modules["variants"] = variants
        for module, quantized_class, aside in attention:
            module.__class__ = quantized_class
            module._modules["variants"] = aside


def _describe(quantizer: Quantizer) -> dict[str, Any]:
    state = quantizer.to_state()
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in state.items()}


def describe_layers(model: nn.Module) -> dict[str, Any]:
    """What `quantization.json` says of each layer: parts, weight formats, input quantizers."""
    description = {}
    for name, layer in quantized_layers(model).items():
        if "learned" not in layer.variants:
            continue
        quantization = cast(LayerQuantization, layer.variants["learned"])
        description[name] = {
            "splits": list(layer.splits),
            "weights": [q.format.name for q in quantization.weights],
            "inputs": [_describe(q) for q in quantization.inputs],
        }
    return description


def describe_attention(model: nn.Module) -> dict[str, Any]:
    """What `quantization.json` says of each module whose attention is quantized: its operands' quantizers."""
    return {
        name: [_describe(q) for q in cast(LayerQuantization, module.variants["learned"]).inputs]
        for name, module in quantized_attention(model).items()
        if "learned" in module.variants
    }


def save_quantized(pipeline: DiffusionPipeline, directory: Path, details: Mapping[str, Any]) -> None:
    """Writes a quantized pipeline, whole or not at all.

    Args:
        pipeline: its denoiser's layers have the variant ``learned``.
        directory: replaced if it exists.
        details: further entries of `quantization.json`: ``base_model``, ``recipe``, ``version``, ``fingerprint``.

    Raises:
        ValueError: if a quantized weight holds NaN or Inf.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    layers, attention = describe_layers(denoiser), describe_attention(denoiser)
    with whole_directory(directory) as temporary:
        with ExitStack() as stack:
            for component in pipeline.components.values():
                if isinstance(component, nn.Module):
                    stack.enter_context(as_plain(component))
            for name in layers:
                if not denoiser.get_submodule(name).weight.isfinite().all():
                    raise ValueError(f"{name}: its quantized weight holds NaN or Inf; nothing was written")
            try:
                pipeline.save_pretrained(temporary)
            except SafetensorError as error:
                raise OSError(errno.EIO, f"{error}", str(directory)) from error
        description = {"format_version": FORMAT_VERSION, **details, "layers": layers, "attention": attention}
        write_json(temporary / FILE, description)
        (temporary / "README.md").write_text(_README.format(file=FILE, **details))


def load_quantized(directory: str | Path) -> DiffusionPipeline:
    """Opens what `save_quantized` wrote, with its activation formats in force.

    Raises:
        FileNotFoundError: if there is no such pipeline.
        ValueError: if `quantization.json` is damaged, of another version, or does not fit the model.
    """
    pipeline = load_pipeline(directory)
    description = read_description(directory)
    denoiser = getattr(pipeline, denoiser_name(pipeline)).eval().requires_grad_(False)
    modules = dict(denoiser.named_modules())
    try:
        for name, entry in description["layers"].items():
            if name not in modules:
                raise ValueError(f"it names a layer {name} that the model lacks")
            if not is_quantizable(modules[name]):
                raise ValueError(f"it names {name}, which is no Linear or Conv layer of the model")
            _apply_inputs(modules[name], entry)
        for name, operands in description.get("attention", {}).items():
            if name not in modules or is_quantizable(modules[name]):
                raise ValueError(f"it names {name}, which is no attention module of the model")
            _apply_operands(modules[name], name, operands)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{Path(directory) / FILE} does not fit the model ({type(error).__name__}: {error}): quantize it again"
        ) from error
    return pipeline


def _apply_inputs(layer: nn.Module, entry: Mapping[str, Any]) -> None:
    """Gives a layer, whose weight is on the grid already, its input quantizers."""
    quantized: QuantizedLayer = make_quantized(layer, Granularity("tensor"), entry["splits"])
    inputs = _read_quantizers(entry["inputs"])
    if len(inputs) not in (0, len(quantized.splits)):
        raise ValueError(f"{len(inputs)} input quantizers for {len(quantized.splits)} parts of the input")
    quantized.variants["learned"] = LayerQuantization(inputs=inputs)
    quantized.set_mode("learned")


def _apply_operands(module: nn.Module, name: str, entry: list[dict[str, Any]]) -> None:
    """Gives a module the quantizers of its attention."""
    operands = _read_quantizers(entry)
    if not operands or len(operands) % len(OPERANDS):
        raise ValueError(f"{len(operands)} quantizers for the attention of {name}, expected {len(OPERANDS)} a call")
    quantized = make_attention_quantized(module, name, len(operands) // len(OPERANDS))
    quantized.variants["learned"] = LayerQuantization(inputs=operands)
    quantized.set_mode("learned")


def _read_quantizers(entries: list[dict[str, Any]]) -> list[Quantizer]:
    """The inverse of `_describe` for each entry."""
    return [
        Quantizer.from_state({k: _tensor(v) if k in ("scale", "offset") else v for k, v in entry.items()})
        for entry in entries
    ]


def _tensor(value: Any) -> Tensor | None:
    return None if value is None else torch.tensor(value, dtype=torch.float32)


def is_quantized(directory: str | Path) -> bool:
    """Whether a directory holds a quantized pipeline."""
    return (Path(directory).expanduser() / FILE).is_file()


def read_description(directory: str | Path) -> dict[str, Any]:
    """Reads `quantization.json`.

    Raises:
        ValueError: if it is damaged or of another version.
    """
    file = Path(directory).expanduser() / FILE
    try:
        description = json.loads(file.read_text())
        version, _ = description["format_version"], description["layers"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): quantize the model again") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{file} has format version {version}; this fpq_lightning reads version {FORMAT_VERSION}")
    return description
