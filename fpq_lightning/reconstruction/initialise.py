"""Where the reconstruction of a unit starts: formats and clips of its layers, weights first, and of its attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from fpq_lightning.formats.numbers import Format
from fpq_lightning.formats.scales import parse_scale_format
from fpq_lightning.graph.units import Unit
from fpq_lightning.nn.attention import OPERANDS, OperandSample, QuantizedAttention
from fpq_lightning.nn.calibrated import LayerQuantization, QuantizedLayer, input_of, running
from fpq_lightning.quantization.quantizer import Quantizer
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.quantization.search import search_output_error, search_tensor_error
from fpq_lightning.reconstruction.share import share
from fpq_lightning.utils import distributed

_MAX_VALUES = 2**20  # of an activation that the search looks at


def collect_layer_inputs(unit: Unit, calls: Iterable[Any]) -> dict[str, Tensor]:
    """The input of every layer of a unit.

    Args:
        unit: its layers are quantized classes.
        calls: lazily makes full-precision calls of the unit.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in unit.layers}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen[name].append(input_of(args, kwargs)), with_kwargs=True
        )
        for name, layer in unit.layers.items()
    ]
    try:
        with torch.no_grad(), running(unit.module, "full_precision"):
            for _ in calls:
                pass
    finally:
        for handle in handles:
            handle.remove()
    readers: dict[tuple[int, ...], list[str]] = {}  # queries, keys and values are made from one tensor
    for name, parts in seen.items():
        readers.setdefault(tuple(map(id, parts)), []).append(name)
    readers.pop((), None)
    found: dict[str, Tensor] = {}
    for names in readers.values():
        found |= dict.fromkeys(names, torch.cat(seen[names[0]]))
        for name in names:
            del seen[name]
    return found


def _operate_part(layer: QuantizedLayer, x: Tensor, weight: Tensor) -> Tensor:
    """The contribution of one part of the input channels to the output, without bias."""
    if isinstance(layer, torch.nn.Linear):
        return F.linear(x, weight)
    if len(layer.splits) == 1:
        return layer.operate(x, weight, None)
    convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.ndim]
    conv = cast(torch.nn.Conv2d, layer)
    padding = conv.padding
    if conv.padding_mode != "zeros":
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), (0,)
    return convolution(x, weight, None, conv.stride, padding, conv.dilation)


def _output_energy(layer: QuantizedLayer, inputs: Iterable[Tensor], weight: Tensor) -> Tensor:
    """Sum of squares of a part's contribution to each output channel, `[out]`, over batches of its float32 input."""
    total: Any = 0
    for x in inputs:
        squared = _operate_part(layer, x, weight).square()
        total = total + squared.sum(dim=[d for d in range(squared.ndim) if d != layer.channel_dim % squared.ndim])
    return total


def _search_weight(
    layer: QuantizedLayer,
    inputs: Callable[[], Iterable[Tensor]],
    part: Tensor,
    formats: tuple[Format, ...],
    recipe: Recipe,
) -> Quantizer:
    rows = layer.granularity.rows(part)
    scale_format = parse_scale_format(layer.granularity.scale_format)
    if recipe.weights.objective != "output":
        return search_tensor_error(rows, formats, recipe.weights.objective == "max", scale_format)
    per_channel = layer.granularity.kind != "tensor"

    def output_error(trial: Quantizer) -> Tensor:
        error = trial(rows).reshape(part.shape) - part
        by_channel = _output_energy(layer, inputs(), error)
        return by_channel if per_channel else by_channel.sum(0, keepdim=True)

    return search_output_error(rows, formats, output_error, scale_format=scale_format)


def _search_tokens(layer: QuantizedLayer, x: Tensor, formats: tuple[Format, ...], passes: int) -> Quantizer:
    def error(trial: Quantizer) -> float:
        return sum((trial(some) - some).square().sum().item() for some in _float_parts(x, passes))

    return min((Quantizer(fmt, None, token_dims=layer.token_dims) for fmt in formats if fmt.min < 0), key=error)


def _float_parts(x: Tensor, passes: int) -> Iterator[Tensor]:
    """An activation in float32, which as a whole may be more than there is memory for."""
    return (some.float() for some in x.chunk(passes))


def _scaled_parts(x: Tensor, factors: Tensor, passes: int) -> Iterator[Tensor]:
    return (some * factor for some, factor in zip(_float_parts(x, passes), factors.chunk(passes), strict=True))


def _search_input(
    layer: QuantizedLayer, x: Tensor, weight: Tensor, formats: tuple[Format, ...], recipe: Recipe, passes: int
) -> Quantizer:
    activations = recipe.activations
    values = _some_values(x)
    # The extremes decide the largest clip tried, wherever the sampling above falls.
    values = torch.cat([values, x.amin().reshape(1, 1).float(), x.amax().reshape(1, 1).float()], dim=1)
    if activations.objective == "output":

        def output_error(trial: Quantizer) -> Tensor:
            changes = (_placed_like(trial, some) - some for some in _float_parts(x, passes))
            return _output_energy(layer, changes, weight).sum().reshape(1)

        quantizer = search_output_error(values, formats, output_error)
    else:
        quantizer = search_tensor_error(values, formats, max_only=activations.objective == "max")
    return _of_tensor(quantizer)


def _of_tensor(quantizer: Quantizer) -> Quantizer:
    """The quantizer of a single row for a tensor of any shape."""
    offset = None if quantizer.offset is None else quantizer.offset.reshape(())
    return Quantizer(quantizer.format, cast(Tensor, quantizer.scale).data.reshape(()), offset)


def _some_values(x: Tensor) -> Tensor:
    values = x.reshape(1, -1)
    return values[:, :: max(1, values.shape[1] // _MAX_VALUES)].float()


def _warn_of_lost_bulk(name: str, quantizer: Quantizer, x: Tensor) -> None:
    """Says so if one static scale, stretched by outliers, leaves little of most values."""
    if quantizer.scale is None:
        return
    values = _some_values(x)
    magnitude = values.abs()
    present = magnitude > 0
    lost = ((quantizer(values) - values).abs() > magnitude / 2) & present
    if lost.sum() > present.sum() / 2:
        ratio = (magnitude.max() / magnitude[present].median()).item()
        warnings.warn(
            f"{name}: one static scale loses more than half of its input's values, for outliers reach {ratio:.0f} "
            "times the median: name it in recipe.activations.token_layers, or exclude it",
            stacklevel=2,
        )


def _placed_like(trial: Quantizer, x: Tensor) -> Tensor:
    return trial(x.reshape(1, -1)).reshape(x.shape)


@torch.no_grad()
def search_unit(unit: Unit, layer_inputs: dict[str, Tensor], weights: Tensor, recipe: Recipe, passes: int = 1) -> None:
    """Chooses format and clip of every weight and input of a unit; gives its layers the variant ``nearest``.

    The processes of a run take some of the layers each.

    Args:
        unit: its layers are quantized classes.
        layer_inputs: of `collect_layer_inputs`.
        weights: how much an error on each sample matters, `[n]`.
        recipe: candidates and objectives.
        passes: in which output errors are computed; more need less memory.

    Raises:
        ValueError: if a weight or an input holds NaN or Inf.
    """
    found: dict[str, LayerQuantization] = {}
    by_size = sorted(unit.layers, key=lambda name: -cast(Tensor, unit.layers[name].weight).numel())
    for name in by_size[distributed.rank() :: distributed.world_size()]:
        layer = cast(QuantizedLayer, unit.layers[name])
        x = layer_inputs[name]
        if not x.isfinite().all():
            raise ValueError(f"{name}: its input holds NaN or Inf on the calibration set; exclude the layer")
        # An output error is linear in the input, so scaled inputs give weighted errors. Layers that see another
        # leading dimension than the samples (tokens folded into it) weigh them alike.
        significance = weights.sqrt() if len(weights) == len(x) else weights.new_ones(len(x))
        quantizers, inputs = [], []
        xs = x.split(layer.splits, dim=layer.channel_dim) if len(layer.splits) > 1 else (x,)
        for part, x_part in zip(layer.weight_parts(), xs, strict=True):
            weight = part
            if formats := recipe.weight_formats():
                scaled = partial(_scaled_parts, x_part, significance.reshape(-1, *[1] * (x.ndim - 1)), passes)
                quantizers.append(_search_weight(layer, scaled, part, formats, recipe))
                weight = quantizers[-1](layer.granularity.rows(part)).reshape(part.shape)
            if formats := recipe.activation_formats():
                if recipe.has_token_scales(name):
                    inputs.append(_search_tokens(layer, x_part, formats, passes))
                else:
                    inputs.append(_search_input(layer, x_part, weight, formats, recipe, passes))
                _warn_of_lost_bulk(name, inputs[-1], x_part)
        found[name] = LayerQuantization(quantizers, inputs)
    found = share(found, weights.device)
    for name, module in unit.layers.items():
        cast(QuantizedLayer, module).variants["nearest"] = found[name]


@torch.no_grad()
def search_attention(unit: Unit, samples: Mapping[str, Sequence[OperandSample]], recipe: Recipe) -> None:
    """Chooses format and clip of every operand of a unit's attention, and gives it the variant ``nearest``.

    The processes of a run take some of the modules each.

    Args:
        unit: its attention modules are quantized classes.
        samples: of `observing`.
        recipe: candidates.

    Raises:
        ValueError: if an operand holds NaN or Inf.
    """
    found: dict[str, LayerQuantization] = {}
    for name in list(samples)[distributed.rank() :: distributed.world_size()]:
        quantizers = []
        for i, sample in enumerate(samples[name]):
            operand, values = OPERANDS[i % len(OPERANDS)], sample.values
            if not values.isfinite().all():
                raise ValueError(f"{name}: its {operand} holds NaN or Inf on the calibration set; exclude the module")
            formats = recipe.softmax_formats() if operand == "softmax" else recipe.attention_formats()
            quantizers.append(_of_tensor(search_tensor_error(values, formats)))
        found[name] = LayerQuantization(inputs=quantizers)
    found = share(found, next(unit.module.parameters()).device)
    for name, module in unit.attention.items():
        cast(QuantizedAttention, module).variants["nearest"] = found[name]
