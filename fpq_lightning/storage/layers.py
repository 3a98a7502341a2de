"""Layers of a model while it is loaded, whoever loads it: emptied for packed files, or chosen and quantized."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from fpq_lightning.formats.scales import parse_scale_format
from fpq_lightning.nn.attention import quantized_attention
from fpq_lightning.nn.calibrated import is_quantizable
from fpq_lightning.nn.convert import make_attention_empty, make_attention_plain, make_empty, make_packed, make_plain
from fpq_lightning.nn.packed_layer import PackedLayer, packed_layers
from fpq_lightning.nn.packed_weight import BlockScaledWeight, PackedWeight
from fpq_lightning.quantization.quantizer import ExactBuffers, Quantizer, layers_without_groups, without_groups
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.quantization.search import search_tensor_error
from fpq_lightning.storage.config import FPQConfig

SCALES = ("scale", "block_scale", "tensor_scale")
"""Names of buffers that hold positive numbers."""

SMALLEST = 2.0**-149
"""Positive number of float32."""


def own_config(config: FPQConfig, pre_quantized: bool) -> FPQConfig:
    """The configuration that a quantizer of a library works with: to quantize, a copy, for the user's serves again.

    Raises:
        ValueError: if a model is to be quantized by the configuration of one that is.
    """
    if pre_quantized:
        return config
    if config.layers is not None:
        raise ValueError("this quantization_config is that of a quantized model: give a new FPQConfig")
    return copy.deepcopy(config)


def make_layers_empty(model: nn.Module, config: FPQConfig) -> None:
    """Makes the layers and the attention of a model packed ones, whose contents are to be loaded.

    Raises:
        ValueError: if the configuration does not fit the model.
    """
    modules = dict(model.named_modules())
    for name, entry in (config.layers or {}).items():
        if name not in modules or not is_quantizable(modules[name]):
            raise ValueError(f"quantization_config names {name}, which is no Linear or Conv layer of the model")
        try:
            make_empty(modules[name], entry)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise ValueError(f"quantization_config does not fit {name}: {reason}") from error
    attention = config.details.get("attention", {})
    if not isinstance(attention, Mapping):
        raise ValueError("quantization_config does not say what attention holds: it is damaged")
    for name, operands in attention.items():
        if name not in modules or is_quantizable(modules[name]):
            raise ValueError(f"quantization_config names {name}, which is no attention module of the model")
        try:
            make_attention_empty(modules[name], name, operands)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"quantization_config does not fit the attention of {name}: {error}") from error


def select_layers(model: nn.Module, config: FPQConfig, kept: Collection[str]) -> list[str]:
    """Names of the layers to quantize; the configuration notes the others.

    Args:
        model: in full precision.
        config: says which layers are not to be converted.
        kept: names of further layers, or of modules around them, that need not be there.

    Raises:
        ValueError: if a pattern of the configuration matches no layer, or all layers are excluded.
    """
    layers = {name: module for name, module in model.named_modules() if is_quantizable(module)}
    excluded: set[str] = set()
    for pattern in [*config.modules_to_not_convert, *kept]:
        matched = {name for name in layers if fnmatchcase(f".{name}.", f"*.{pattern}.*")}
        if not matched and pattern not in kept:
            raise ValueError(f"modules_to_not_convert: {pattern!r} matches none of the {len(layers)} layers")
        excluded |= matched
    chosen = [name for name in layers if name not in excluded]
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no Linear or Conv layer that is to be quantized")
    granularity = config.recipe.granularity()
    weights = {name: cast(Tensor, layers[name].weight) for name in chosen}
    if unfit := layers_without_groups(granularity, weights):
        warnings.warn(without_groups(granularity, unfit), stacklevel=2)
    config.recipe.exclude = sorted(excluded)
    config.details["recipe"] = config.recipe.to_dict()
    return chosen


@torch.no_grad()
def quantize_layer(layer: nn.Module, name: str, weight: Tensor, recipe: Recipe) -> PackedLayer:
    """Makes a layer a packed one, with a weight that is rounded to nearest.

    Args:
        layer: plain.
        name: of its weight.
        weight: in full precision.
        recipe: what to quantize to.

    Raises:
        ValueError: if the weight holds NaN or Inf.
    """
    values = weight.float()
    if not values.isfinite().all():
        raise ValueError(f"{name} holds NaN or Inf: name its layer in modules_to_not_convert")
    granularity = recipe.granularity().fitting([values])
    rows = granularity.rows(values)
    quantizer = search_tensor_error(
        rows, recipe.weight_formats(), scale_format=parse_scale_format(granularity.scale_format)
    )
    packed = PackedWeight.of(quantizer, quantizer.encode(rows), values.shape)
    return make_packed(layer, [values.shape[1]], [packed], [])


def dequantize(model: nn.Module) -> None:
    """Makes the packed layers and attention of a model plain ones, in the types that the model was cast to."""
    for layer in packed_layers(model).values():
        kept = layer.type_of_weight if layer.bias is None else layer.bias  # in float32 some are in any model
        make_plain(layer, kept.dtype)
    for attention in quantized_attention(model).values():
        make_attention_plain(attention)


def check_scales(modules: Mapping[str, nn.Module]) -> None:
    """Looks whether all scales are positive numbers, and all offsets numbers, many at a time.

    Raises:
        ValueError: if one is not.
    """
    found: dict[tuple[Any, ...], dict[str, Tensor]] = {}
    for name, parent in modules.items():
        if isinstance(parent, ExactBuffers):
            for scale in (*SCALES, "offset"):
                if (value := parent._buffers.get(scale)) is not None and value.numel():
                    key = (value.device, value.dtype, *_bounds(parent, scale))
                    found.setdefault(key, {})[f"{name}.{scale}"] = value

    def inside(values: Iterable[Tensor], low: float, high: float) -> bool:
        every = torch.cat([v.view(torch.uint8 if v.itemsize == 1 else v.dtype).flatten() for v in values])
        return bool(((every >= low) & (every <= high)).all())

    for (_, _, low, high), scales in found.items():
        if not inside(scales.values(), low, high):
            name = next(name for name, value in scales.items() if not inside([value], low, high))
            kind = "an offset that is no" if name.endswith("offset") else "a scale that is no positive"
            raise ValueError(f"{name} holds {kind} number: the file is damaged")


def _bounds(parent: nn.Module, name: str) -> tuple[float, float]:
    """What the numbers of a buffer are between; codes where scales have a format of their own."""
    if name == "offset":
        return torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    if not isinstance(parent, BlockScaledWeight):
        smallest = torch.finfo(torch.float32).tiny if isinstance(parent, Quantizer) else SMALLEST  # has an inverse
        return smallest, torch.finfo(torch.float32).max
    if name == "block_scale":
        return parent.scale_format.codes
    return SMALLEST, torch.finfo(torch.float32).max / float(parent.scale_format.values.nan_to_num().max())
