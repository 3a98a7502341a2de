"""Plain layers and attention to calibrated ones, to packed ones, and back; always in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fpq_lightning.nn.attention import (
    OPERANDS,
    InterceptedAttention,
    PackedAttention,
    QuantizedAttention,
)
from fpq_lightning.nn.backends.paths import fitting_paths
from fpq_lightning.nn.calibrated import (
    QUANTIZED_CLASSES,
    LayerQuantization,
    QuantizedLayer,
    Variants,
    as_modules,
    operation_of,
)
from fpq_lightning.nn.input_quantizer import empty_quantizer
from fpq_lightning.nn.packed_layer import PACKED_CLASSES, PackedLayer
from fpq_lightning.nn.packed_weight import PackedWeight
from fpq_lightning.nn.swap import SwappedModule, class_for, restore, swap
from fpq_lightning.quantization.quantizer import Granularity, Quantizer

L = TypeVar("L", bound=SwappedModule)


def _plain_class(layer: nn.Module) -> type[nn.Module]:
    return layer.plain if isinstance(layer, SwappedModule) else type(layer)


def _class_of(classes: Mapping[type[nn.Module], type[L]], layer: nn.Module) -> type[L]:
    """The class of a layer's operation; one of its own for a subclass, which may hold more."""
    plain = _plain_class(layer)
    kind = classes[cast(type[nn.Module], operation_of(plain))]
    return kind if kind.plain is plain else class_for(kind, plain)


# --- layers --------------------------------------------------------------------------------------------------------


def make_quantized(layer: nn.Module, granularity: Granularity, splits: Sequence[int] | None = None) -> QuantizedLayer:
    """Turns a layer into its calibrated class in place; it starts in mode ``full_precision``.

    Args:
        layer: a Linear or Conv layer.
        granularity: of the weight scales.
        splits: sizes of the parts of the input channels; one part if None or if groups of channels are convolved
            apart.

    Raises:
        ValueError: if `splits` do not add up to the input channels, or the layer is quantized already.
    """
    if isinstance(layer, SwappedModule):
        raise ValueError(f"{type(layer).__name__} is quantized already: load the full-precision model again")
    channels = cast(Tensor, layer.weight).shape[1]
    sizes = (channels,) if splits is None or getattr(layer, "groups", 1) != 1 else tuple(splits)
    if sum(sizes) != channels:
        raise ValueError(f"splits {sizes} do not add up to {channels} input channels")
    return swap(
        layer,
        _class_of(QUANTIZED_CLASSES, layer),
        splits=sizes,
        granularity=granularity,
        variants=Variants(),
        mode="full_precision",
        _effective_weight=None,
    )


def make_packed(
    layer: nn.Module, splits: Sequence[int], weights: Sequence[PackedWeight], inputs: Sequence[Quantizer]
) -> PackedLayer:
    """Turns a Linear or Conv layer into its packed class in place; its full-precision weight is let go.

    Args:
        layer: the layer.
        splits: input channels of each part.
        weights: one a part, or none to keep the weight.
        inputs: one a part, or none.
    """
    weight = cast(Tensor, layer.weight)
    device = "cpu" if weight.is_meta else weight.device  # for it is not loaded
    packed = swap(
        layer,
        _class_of(PACKED_CLASSES, layer),
        shape=tuple(weight.shape),
        splits=tuple(splits),
        weights=as_modules(weights),
        inputs=as_modules(inputs),
        type_of_weight=nn.Buffer(torch.empty(0, dtype=weight.dtype, device=device), persistent=False),
        paths=(),
        arithmetic="native",
        _plan=None,
    )
    if len(weights):
        del layer._parameters["weight"]
    packed.paths = fitting_paths(packed.operands)
    if packed.bias is not None:
        packed.bias.requires_grad_(False)  # low-bit products have no gradient
    return packed


def make_empty(layer: nn.Module, entry: Mapping[str, Any]) -> PackedLayer:
    """`make_packed` for contents that are to be loaded, from what `PackedLayer.describe` said.

    Raises:
        ValueError: if it does not fit the layer.
    """
    shape, splits = tuple(cast(Tensor, layer.weight).shape), tuple(entry["splits"])
    if tuple(entry["shape"]) != shape:
        raise ValueError(f"its weight is {list(entry['shape'])} in the file and {list(shape)} in the model")
    if min(splits) < 1 or sum(splits) != shape[1]:
        raise ValueError(f"splits {list(splits)} do not add up to {shape[1]} input channels")
    for kind in ("weights", "inputs"):
        if len(entry[kind]) not in (0, len(splits)):
            raise ValueError(f"{len(entry[kind])} {kind} for {len(splits)} parts")
    parts = zip(entry["weights"], splits, strict=False)
    weights = [PackedWeight.empty(part, (shape[0], n, *shape[2:])) for part, n in parts]
    return make_packed(layer, splits, weights, [empty_quantizer(q) for q in entry["inputs"]])


def pack_layer(layer: QuantizedLayer, quantization: LayerQuantization) -> PackedLayer:
    """Packs a calibrated layer in place."""
    shape, codes = layer.weight.shape, quantization.codes
    if codes is None:
        codes = [q.encode(rows) for q, rows in zip(quantization.weights, layer.weight_rows(), strict=False)]
    parts = zip(quantization.weights, codes, layer.splits, strict=False)
    weights = [PackedWeight.of(q, c.to(layer.weight.device), (shape[0], n, *shape[2:])) for q, c, n in parts]
    if quantization.bias is not None:
        layer.bias = nn.Parameter(quantization.bias.detach().clone(), requires_grad=False)
    return make_packed(layer, layer.splits, weights, list(quantization.inputs))


def make_plain(layer: PackedLayer | QuantizedLayer, dtype: torch.dtype = torch.float32) -> None:
    """Turns a layer into the plain class in place, with the values of its quantized weight, if it has one."""
    weight, bias = quantized_weight(layer), layer.bias
    if isinstance(layer, QuantizedLayer) and "quantized" in layer.variants:
        corrected = layer.variants["quantized"].bias
        bias = bias if corrected is None else nn.Parameter(corrected.detach().clone(), requires_grad=False)
    plain: Any = restore(layer)
    plain.weight = nn.Parameter(weight.detach().to(dtype).clone(), requires_grad=False)
    plain.bias = bias


def quantized_weight(layer: PackedLayer | QuantizedLayer) -> Tensor:
    """The weight that is stored of a layer, float32 where it is quantized."""
    if isinstance(layer, PackedLayer):
        return layer.decode_weight() if len(layer.weights) else layer.weight
    if "quantized" in layer.variants:
        return layer.quantized_weight(layer.variants["quantized"])
    return layer.weight


# --- attention -----------------------------------------------------------------------------------------------------


def make_attention_quantized(module: nn.Module, name: str, n_calls: int) -> QuantizedAttention:
    """Turns a module into one whose attention is quantized, in place; it starts in mode ``full_precision``.

    Args:
        module: calls `torch.nn.functional.scaled_dot_product_attention`, itself and not in modules below it.
        name: of the module in the network.
        n_calls: how often in a forward pass.
    """
    return swap(
        module,
        class_for(QuantizedAttention, type(module)),
        full_name=name,
        n_calls=n_calls,
        observers=(),
        variants=Variants(),
        mode="full_precision",
    )


def _make_attention_packed(
    module: nn.Module, name: str, n_calls: int, operands: Sequence[Quantizer]
) -> PackedAttention:
    kind = class_for(PackedAttention, _plain_class(module))
    return swap(module, kind, full_name=name, n_calls=n_calls, operands=as_modules(operands))


def pack_attention(module: QuantizedAttention) -> PackedAttention:
    """Packs the attention of a calibrated module in place: of its variants it keeps ``quantized``."""
    operands = list(module.variants["quantized"].inputs)
    return _make_attention_packed(module, module.full_name, module.n_calls, operands)


def make_attention_empty(module: nn.Module, name: str, entry: Sequence[Mapping[str, Any]]) -> PackedAttention:
    """Makes the attention of a module a packed one whose scales are to be loaded.

    Args:
        module: plain.
        name: of the module in the network.
        entry: what `PackedAttention.describe` said.

    Raises:
        ValueError: if the description does not say the operands of whole calls.
    """
    if not entry or len(entry) % len(OPERANDS):
        raise ValueError(f"{len(entry)} quantizers for attention, expected {len(OPERANDS)} a call")
    return _make_attention_packed(module, name, len(entry) // len(OPERANDS), [empty_quantizer(q) for q in entry])


def make_attention_plain(module: InterceptedAttention) -> None:
    """Turns a module back into what it was, in place."""
    restore(module)
