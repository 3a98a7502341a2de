"""Key layouts of other libraries, for their readers: Linear layers as codes and scales, all else as plain weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fpq_lightning.nn.calibrated import is_quantizable
from fpq_lightning.nn.packed import PackedLayer, PackedWeight, make_plain, packed_layers

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How one reader wants a quantized model.

    Attributes:
        takes: the layers that fit, in words.
        recipe: options of ``fpq fit`` that give such layers.
        tensors: what is stored of a layer in place of its weight, by name within the layer; None if it does not fit.
        config: the ``quantization_config`` for the names of the layers that stay in full precision, and the version of
            this package.
        settle: changes the tensors of layers by name, in place, where those of several must agree.
    """

    takes: str
    recipe: str
    tensors: Callable[[PackedLayer], Tensors | None]
    config: Callable[[list[str], str], dict[str, Any]]
    settle: Callable[[dict[str, Tensors]], None] = lambda tensors: None


def whole_linear_weight(layer: PackedLayer) -> PackedWeight | None:
    """The packed weight of a Linear layer if it is in one part and has no offset: no layout knows others."""
    if not isinstance(layer, nn.Linear) or len(layer.weights) != 1 or layer.weights[0].offset is not None:
        return None
    return layer.weights[0]


def apply_layout(model: nn.Module, layouts: tuple[Layout, ...], version: str) -> dict[str, Any]:
    """Gives a model whose quantized layers are packed the tensors of that layout which most of them fit.

    Args:
        model: changed in place: its layers become plain classes, some with other tensors than a weight.
        layouts: to choose from.
        version: of this package.

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
