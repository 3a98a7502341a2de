"""Key layouts of other libraries: Linear layers as codes and scales, all else as plain weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fpq_lightning.diffusion.denoisers import quantized_denoisers
from fpq_lightning.nn.calibrated import is_quantizable
from fpq_lightning.nn.convert import make_plain
from fpq_lightning.nn.packed_layer import PackedLayer, packed_layers
from fpq_lightning.nn.packed_weight import BlockScaledWeight, PackedWeight
from fpq_lightning.storage.exports.registry import EXPORTS, Export, make_pipeline_plain

Tensors = dict[str, Tensor]

_E2M1 = ("e2m1", "float4_e2m1fn")  # whose codes are those of FP4 tensor cores


@dataclass(frozen=True)
class Layout:
    """How another library stores a quantized model.

    Attributes:
        takes: the layers that fit, in words.
        recipe: options of ``fpq fit`` that give such layers.
        tensors: the tensors of a layer that replace its weight, by name within the layer; None if it does not fit.
        config: makes the ``quantization_config`` from the names of the layers in full precision and the version of
            this package.
        settle: changes the tensors of layers by name, in place, where those of several must agree.
    """

    takes: str
    recipe: str
    tensors: Callable[[PackedLayer], Tensors | None]
    config: Callable[[list[str], str], dict[str, Any]]
    settle: Callable[[dict[str, Tensors]], None] = lambda tensors: None


def whole_linear_weight(layer: PackedLayer) -> PackedWeight | None:
    """The packed weight of a Linear layer in one part without offset; None for others, which no layout knows."""
    if not isinstance(layer, nn.Linear) or len(layer.weights) != 1 or layer.weights[0].offset is not None:
        return None
    return layer.weights[0]


def fp4_blocks(layer: PackedLayer, size: int, scale_format: str) -> BlockScaledWeight | None:
    """The packed weight of a Linear layer in E2M1 whose blocks of `size` have such scales; None for others."""
    weight = whole_linear_weight(layer)
    if not isinstance(weight, BlockScaledWeight) or weight.format.name not in _E2M1:
        return None
    fits = weight.scale_format.name == scale_format and weight.shape[1] == size * weight.block_scale.shape[1]
    return weight if fits else None


def register_layouts(name: str, help: str, library: str, *layouts: Layout) -> None:
    """Registers an export that writes the layout which fits most layers of a model.

    Args:
        name: of the export.
        help: one line for the command line.
        library: whose layouts they are.
        layouts: to choose from.
    """

    def convert(pipeline: DiffusionPipeline, details: Mapping[str, Any], directory: Path) -> None:
        denoisers = quantized_denoisers(pipeline)
        configs = {name: _apply(one, layouts, details.get("version", "?")) for name, one in denoisers.items()}
        make_pipeline_plain(pipeline)
        for name, denoiser in denoisers.items():
            cast(Any, denoiser).register_to_config(quantization_config=configs[name])

    usage = f"""The denoiser's Linear layers hold codes and scales in the key layout of {library}.
`quantization_config` in its `config.json` names the layers that have plain weights. docs/format.md of fpq_lightning
lists the programs that read it. diffusers does not; `fpq export` of the packed files writes forms that it reads.
"""
    EXPORTS.register(Export(name, help, usage, convert))


def _apply(model: nn.Module, layouts: tuple[Layout, ...], version: str) -> dict[str, Any]:
    """Makes the packed layers of a model plain ones, with the tensors of the layout that most of them fit.

    Returns:
        Its ``quantization_config``.

    Raises:
        ValueError: if no layer fits.
    """
    layers = packed_layers(model)
    found = [
        {name: t for name, layer in layers.items() if (t := layout.tensors(layer)) is not None} for layout in layouts
    ]
    fitting, layout = max(zip(found, layouts, strict=True), key=lambda pair: len(pair[0]))
    if not fitting:
        raise ValueError(
            f"no layer fits this format, which takes {' or '.join(layout.takes for layout in layouts)}; "
            f"such layers come from fpq fit {layouts[-1].recipe}"
        )
    if unfit := [name for name in layers if name not in fitting]:
        shown = ", ".join(unfit[:5]) + (f" and {len(unfit) - 5} more" if len(unfit) > 5 else "")
        warnings.warn(
            f"{len(unfit)} of {len(layers)} quantized layers do not fit this format, which takes {layout.takes}; "
            f"their quantized weights are written as float32: {shown}",
            stacklevel=2,
        )
    layout.settle(fitting)
    for name, layer in layers.items():
        make_plain(layer)
        if name in fitting:
            del layer._parameters["weight"]
            for tensor_name, tensor in fitting[name].items():
                layer.register_buffer(tensor_name, tensor.contiguous())
    ignored = [name for name, module in model.named_modules() if is_quantizable(module) and name not in fitting]
    return layout.config(ignored, version)
