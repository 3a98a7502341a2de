"""Quantized diffusers pipelines on disk: writing in any form (`fpq_lightning.storage.exports`), and reading.

Packed and dequantized pipelines are read here; the other forms are for other libraries.
"""

from __future__ import annotations

import copy
import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import nn

from fpq_lightning.diffusion.pipelines import denoiser_name, load_pipeline, quantization_of
from fpq_lightning.nn.attention import QuantizedAttention, quantized_attention
from fpq_lightning.nn.calibrated import QuantizedLayer, quantized_layers
from fpq_lightning.nn.convert import make_plain, pack_attention, pack_layer, quantized_weight
from fpq_lightning.nn.packed_layer import PackedLayer, packed_layers
from fpq_lightning.nn.swap import SwappedModule
from fpq_lightning.storage import dequantized
from fpq_lightning.storage.config import FPQConfig, QuantizationMethod
from fpq_lightning.storage.exports.registry import EXPORTS
from fpq_lightning.storage.headers import read_header
from fpq_lightning.utils.files import atomic_directory

_README = """# A quantized diffusion model

Made by fpq_lightning {version} from `{base_model}`.

{usage}"""


@contextmanager
def _restored(models: Sequence[nn.Module]) -> Iterator[None]:
    """Restores the quantized modules of models, and their configurations, after a block that changes them.

    Within the block no quantizer looks whether the models are still as they were opened.
    """

    def state(module: nn.Module) -> dict[str, Any]:
        return {k: copy.copy(v) if k in ("_parameters", "_buffers", "_modules") else v for k, v in vars(module).items()}

    quantized = [m for model in models for m in model.modules() if isinstance(m, SwappedModule)]
    before = [(module, type(module), state(module)) for module in quantized]
    configurations = [(model, model._internal_dict) for model in models if hasattr(model, "_internal_dict")]
    others = [model.config for model in models if not hasattr(model, "_internal_dict") and hasattr(model, "config")]
    options = [(config, dict(vars(config))) for config in others if hasattr(config, "__dict__")]  # of transformers
    quantizers = [(model, vars(model).pop("hf_quantizer")) for model in models if "hf_quantizer" in vars(model)]
    try:
        yield
    finally:
        for module, kind, attributes in before:
            module.__class__ = kind
            module.__dict__ = attributes
        for model, configuration in configurations:
            model._internal_dict = configuration
        for config, values in options:
            config.__dict__ = values
        for model, quantizer in quantizers:
            model.hf_quantizer = quantizer


def save_quantized(pipeline: DiffusionPipeline, directory: Path, details: Mapping[str, Any], form: str = "fpq") -> None:
    """Writes a quantized pipeline, whole or not at all; the pipeline stays as it is.

    Args:
        pipeline: its denoiser's layers have the variant ``quantized`` or are packed.
        directory: replaced if it exists.
        details: where it comes from: ``base_model``, ``recipe``, ``version``, ``fingerprint``.
        form: the name of an export.

    Raises:
        ValueError: if there is no such export, a quantized weight holds NaN or Inf, or no layer fits the export.
    """
    export, denoiser = EXPORTS[form], getattr(pipeline, denoiser_name(pipeline))
    calibrated = {name: layer for name, layer in quantized_layers(denoiser).items() if "quantized" in layer.variants}
    stored: dict[str, QuantizedLayer | PackedLayer] = {**calibrated, **packed_layers(denoiser)}
    for name, layer in stored.items():
        if not quantized_weight(layer).isfinite().all():
            raise ValueError(f"{name}: its quantized weight holds NaN or Inf; nothing was written")
    components = [c for c in pipeline.components.values() if isinstance(c, nn.Module)]
    with atomic_directory(directory) as temporary, _restored(components):
        for chosen in calibrated.values():
            pack_layer(chosen, chosen.variants["quantized"])
        for attention in quantized_attention(denoiser).values():
            if isinstance(attention, QuantizedAttention) and "quantized" in attention.variants:
                pack_attention(attention)
        for component in components:
            for left in quantized_layers(component).values():
                make_plain(left)
        export.convert(pipeline, details, temporary)
        try:
            pipeline.save_pretrained(temporary)
        except SafetensorError as error:
            raise OSError(errno.EIO, f"{error}", str(directory)) from error
        names = {"version": details.get("version", "?"), "base_model": details.get("base_model", "?")}
        (temporary / "README.md").write_text(_README.format(**names, usage=export.usage))


def load_quantized(directory: str | Path, kind: type[DiffusionPipeline] = DiffusionPipeline) -> DiffusionPipeline:
    """Opens a packed or dequantized pipeline, with all activation formats in force.

    Args:
        directory: of the pipeline.
        kind: class to open it as; `DiffusionPipeline` takes the one that it was written as.

    Raises:
        FileNotFoundError: if there is no such pipeline.
        ValueError: if a file is damaged, of another version, or does not fit the model.
    """
    packed = _packed_config(Path(directory).expanduser())
    if packed is not None:
        for file in sorted(packed.parent.glob("*.safetensors")):
            read_header(file)  # its error names the tensor that is cut off, unlike that of diffusers
    pipeline = load_pipeline(directory, kind=kind)
    denoiser = getattr(pipeline, denoiser_name(pipeline)).eval().requires_grad_(False)
    if packed is None:
        dequantized.apply_inputs(denoiser, read_description(directory))
    return pipeline


def _packed_config(directory: Path) -> Path | None:
    """The configuration of the packed denoiser of a pipeline, None if it has none."""
    found = quantization_of(directory)
    return found[0] if found is not None and found[1] == QuantizationMethod.FPQ.value else None


def is_quantized(directory: str | Path) -> bool:
    """Whether a directory holds a quantized pipeline that `load_quantized` opens."""
    path = Path(directory).expanduser()
    return (path / dequantized.FILE).is_file() or _packed_config(path) is not None


def read_description(directory: str | Path) -> dict[str, Any]:
    """The description of a quantized pipeline: formats of its ``layers``, ``base_model``, ``recipe``, ``version``.

    Raises:
        ValueError: if it is damaged or of another version.
    """
    path = Path(directory).expanduser()
    config = _packed_config(path)
    if config is None:
        return dequantized.read_description(path)
    return FPQConfig.from_dict(json.loads(config.read_text())["quantization_config"]).to_dict()
