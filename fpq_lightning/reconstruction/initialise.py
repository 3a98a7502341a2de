"""Where the reconstruction of a unit starts: formats and clips of its layers, weights first, and of its attention."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from fpq_lightning.formats.numbers import Format
from fpq_lightning.formats.scales import parse_scale_format
from fpq_lightning.graph.units import Unit
from fpq_lightning.nn.attention import OPERANDS, OperandSample, QuantizedAttention
from fpq_lightning.nn.calibrated import LayerQuantization, QuantizedLayer, input_of, running
from fpq_lightning.nn.patches import count_places
from fpq_lightning.quantization.quantizer import Quantizer
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.quantization.search import search_output_error, search_tensor_error
from fpq_lightning.reconstruction.places import at_places
from fpq_lightning.reconstruction.share import share
from fpq_lightning.utils import distributed

_MAX_VALUES = 2**20  # of an activation that the search looks at


Inputs = Tensor | list[Tensor]
"""What a layer reads, along the samples; a list if it is called several times, or with different shapes."""


def collect_layer_inputs(unit: Unit, calls: Iterable[Any]) -> dict[str, Inputs]:
    """The input of every layer of a unit that runs.

    Args:
        unit: its layers are quantized classes.
        calls: lazily makes full-precision calls of the unit.
    """
    # Of each layer, what its first, second, ... calls in a call of the unit read, by shape.
    seen: dict[str, dict[Any, list[Tensor]]] = {name: {} for name in unit.layers}
    made: Counter[str] = Counter()

    def keep(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            x = layer.batched(input_of(args, kwargs))
            if x.numel():  # an expert that is not chosen may be called without tokens
                seen[name].setdefault((made[name], x.shape[1:]), []).append(x)
            made[name] += 1

        return hook

    handles = [layer.register_forward_pre_hook(keep(name), with_kwargs=True) for name, layer in unit.layers.items()]
    try:
        with torch.no_grad(), running(unit.module, "full_precision"):
            for _ in calls:
                made.clear()
    finally:
        for handle in handles:
            handle.remove()
    readers: dict[tuple[int, ...], list[str]] = {}  # queries, keys and values are made from one tensor
    for name, by_call in seen.items():
        readers.setdefault(tuple(id(x) for parts in by_call.values() for x in parts), []).append(name)
    readers.pop((), None)
    found: dict[str, Inputs] = {}
    for names in readers.values():
        inputs = [torch.cat(parts) for parts in seen[names[0]].values()]
        found |= dict.fromkeys(names, inputs[0] if len(inputs) == 1 else inputs)
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


class _Places:
    """What a layer reads at some places of each sample, for the output errors of its weight.

    Args:
        layer: the layer.
        xs: what it reads in each call.
        factors: of each sample in a call; output errors are squared after that.
        samples: their numbers, of `at_places`.
        passes: in which errors are computed.
    """

    def __init__(
        self, layer: QuantizedLayer, xs: list[Tensor], factors: list[Tensor], samples: Tensor, passes: int
    ) -> None:
        self._passes = passes
        self._sizes = [n * layer.weight[0, 0].numel() for n in layer.splits]
        self._found = []
        for x, factor in zip(xs, factors, strict=True):
            rows = at_places(layer, x, samples)
            drawn = rows.shape[1] / count_places(layer, x)  # they stand for all
            self._found.append((rows, factor / drawn**0.5))

    def energy(self, part: int, weight: Tensor) -> Tensor:
        """Sum of squares of what a part of the weight contributes to each output channel, `[out]`.

        Args:
            part: its number.
            weight: in its place, `[out, in / groups, ...]`.
        """
        start = sum(self._sizes[:part])
        rows_of_groups = weight.flatten(1)
        total: Any = 0
        for rows, factor in self._found:
            for some, factors in zip(rows.chunk(self._passes), factor.chunk(self._passes), strict=True):
                some = some[..., start : start + self._sizes[part]].float() * factors[:, None, None, None]
                by_group = rows_of_groups.unflatten(0, (some.shape[2], -1))
                total = total + torch.einsum("bpgn,gon->bpgo", some, by_group).square().sum((0, 1)).flatten()
        return total


def _search_weight(
    layer: QuantizedLayer,
    places: _Places | None,
    number: int,
    part: Tensor,
    formats: tuple[Format, ...],
    recipe: Recipe,
) -> Quantizer:
    rows = layer.granularity.rows(part)
    scale_format = parse_scale_format(layer.granularity.scale_format)
    if places is None:
        return search_tensor_error(rows, formats, recipe.weights.objective == "max", scale_format)
    per_channel = layer.granularity.kind != "tensor"

    def output_error(trial: Quantizer) -> Tensor:
        by_channel = places.energy(number, trial(rows).reshape(part.shape) - part)
        return by_channel if per_channel else by_channel.sum(0, keepdim=True)

    return search_output_error(rows, formats, output_error, scale_format=scale_format)


def _search_tokens(layer: QuantizedLayer, xs: list[Tensor], formats: tuple[Format, ...], passes: int) -> Quantizer:
    def error(trial: Quantizer) -> float:
        return sum((trial(some) - some).square().sum().item() for some in _float_parts(xs, passes))

    return min((Quantizer(fmt, None, token_dims=layer.token_dims) for fmt in formats if fmt.min < 0), key=error)


def _float_parts(xs: list[Tensor], passes: int) -> Iterator[Tensor]:
    """An activation in float32, which as a whole may be more than there is memory for."""
    return (some.float() for x in xs for some in x.chunk(passes))


def _search_input(
    layer: QuantizedLayer, xs: list[Tensor], weight: Tensor, formats: tuple[Format, ...], recipe: Recipe, passes: int
) -> Quantizer:
    activations = recipe.activations
    values = _some_values(xs)
    # The extremes decide the largest clip tried, wherever the sampling above falls.
    extremes = [extreme.reshape(1, 1).float() for x in xs for extreme in x.aminmax()]
    values = torch.cat([values, *extremes], dim=1)
    if activations.objective == "output":

        def output_error(trial: Quantizer) -> Tensor:
            changes = (_placed_like(trial, some) - some for some in _float_parts(xs, passes))
            return _output_energy(layer, changes, weight).sum().reshape(1)

        quantizer = search_output_error(values, formats, output_error)
    else:
        quantizer = search_tensor_error(values, formats, max_only=activations.objective == "max")
    return _of_tensor(quantizer)


def _of_tensor(quantizer: Quantizer) -> Quantizer:
    """The quantizer of a single row for a tensor of any shape."""
    offset = None if quantizer.offset is None else quantizer.offset.reshape(())
    return Quantizer(quantizer.format, cast(Tensor, quantizer.scale).data.reshape(()), offset)


def _some_values(xs: list[Tensor]) -> Tensor:
    step = max(1, sum(x.numel() for x in xs) // _MAX_VALUES)
    return torch.cat([x.reshape(1, -1)[:, ::step].float() for x in xs], dim=1)


def _warn_of_lost_bulk(name: str, quantizer: Quantizer, xs: list[Tensor]) -> None:
    """Says so if one static scale, stretched by outliers, leaves little of most values."""
    if quantizer.scale is None:
        return
    values = _some_values(xs)
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
def search_unit(
    unit: Unit,
    layer_inputs: Mapping[str, Inputs],
    weights: Tensor,
    recipe: Recipe,
    passes: int = 1,
    samples: Tensor | None = None,
) -> None:
    """Chooses format and clip of every weight and input of a unit; gives its layers the variant ``nearest``.

    The processes of a run take some of the layers each. A layer without inputs keeps its input in full precision.

    Args:
        unit: its layers are quantized classes.
        layer_inputs: of `collect_layer_inputs`.
        weights: how much an error on each sample matters, `[n]`.
        recipe: candidates and objectives.
        passes: in which output errors are computed; more need less memory.
        samples: numbers of the samples, int64 `[n]`, which decide at what places output errors of weights are measured;
            by default 0, 1, and so on.

    Raises:
        ValueError: if a weight or an input holds NaN or Inf.
    """
    samples = torch.arange(len(weights)) if samples is None else samples
    found: dict[str, LayerQuantization] = {}
    by_size = sorted(unit.layers, key=lambda name: -cast(Tensor, unit.layers[name].weight).numel())
    for name in by_size[distributed.rank() :: distributed.world_size()]:
        layer = cast(QuantizedLayer, unit.layers[name])
        read = layer_inputs.get(name, [])
        xs = [read] if isinstance(read, Tensor) else read
        found[name] = _search_layer(name, layer, xs, weights, recipe, passes, samples)
    found = share(found, weights.device)
    for name, module in unit.layers.items():
        cast(QuantizedLayer, module).variants["nearest"] = found[name]


def _search_layer(
    name: str,
    layer: QuantizedLayer,
    xs: list[Tensor],
    weights: Tensor,
    recipe: Recipe,
    passes: int,
    samples: Tensor,
) -> LayerQuantization:
    # Extremes tell, and take no memory; the inputs of a unit take much.
    if not all(extreme.isfinite() for x in xs for extreme in x.aminmax()):
        raise ValueError(f"{name}: its input holds NaN or Inf on the calibration set; exclude the layer")
    # An output error is linear in the input, so scaled inputs give weighted errors. Layers that see another leading
    # dimension than the samples (tokens folded into it) weigh them alike.
    significance = [weights.sqrt() if len(weights) == len(x) else weights.new_ones(len(x)) for x in xs]
    quantizers, inputs = [], []
    searches = xs and recipe.weight_formats() and recipe.weights.objective == "output"
    places = _Places(layer, xs, significance, samples, passes) if searches else None
    pieces = [x.split(layer.splits, dim=layer.channel_dim) if len(layer.splits) > 1 else (x,) for x in xs]
    for i, part in enumerate(layer.weight_parts()):
        weight, mine = part, [piece[i] for piece in pieces]
        if formats := recipe.weight_formats():
            quantizers.append(_search_weight(layer, places, i, part, formats, recipe))
            weight = quantizers[-1](layer.granularity.rows(part)).reshape(part.shape)
        if mine and (formats := recipe.activation_formats()):
            if recipe.has_token_scales(name):
                inputs.append(_search_tokens(layer, mine, formats, passes))
            else:
                inputs.append(_search_input(layer, mine, weight, formats, recipe, passes))
            _warn_of_lost_bulk(name, inputs[-1], mine)
    return LayerQuantization(quantizers, inputs)


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
