"""Layers whose weights are packed codes, in files as in memory.

A weight is never kept decoded, so that it takes the bytes of its codes and no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fpq_lightning.formats.numbers import Format, parse_format
from fpq_lightning.formats.packing import pack, packed_length
from fpq_lightning.formats.scales import FLOAT32, SCALE_FORMATS, ScaleFormat
from fpq_lightning.kernels import ops
from fpq_lightning.nn.attention import OPERANDS, QuantizedAttention, make_attention_quantized, quantized_attention
from fpq_lightning.nn.backends.paths import Arithmetic, Path, Plan, low_bit_paths, plan_for, run
from fpq_lightning.nn.calibrated import LayerQuantization, QuantizedLayer, SplitLayer, as_modules
from fpq_lightning.nn.decoded_weight import DecodedWeight
from fpq_lightning.quantization.quantizer import ExactBuffers, Quantizer

NATIVE_TYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
"""Formats whose codes are those of a torch type; all others are stored as uint8."""


class PackedWeight(ExactBuffers):
    """The codes of a weight, or of a part of it, with their format and scales.

    Args:
        fmt: the number format.
        shape: `[out, in, ...]` of the weight.
        codes: packed rows `[out, bytes]`, uint8 or the native type of the format.
        scale: float32 `[1, 1]`, `[out, 1]` or `[out, groups]`: of the tensor, of each output channel, or of each
            group of consecutive weights of one.
        offset: value of code zero, float32 like `scale`; None means 0.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    column: tuple[Tensor, Tensor | None, Any, Tensor] | None = None  # of the FP8 path, after what it was made from

    def __init__(self, fmt: Format, shape: Sequence[int], codes: Tensor, scale: Tensor, offset: Tensor | None) -> None:
        super().__init__()
        self.format = fmt
        self.shape = tuple(shape)
        self.register_buffer("codes", codes)
        self._keep_scale(scale)
        self.register_buffer("offset", offset)

    def _keep_scale(self, scale: Tensor) -> None:
        self.register_buffer("scale", scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        self.column = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "column": None}  # copies count the changes of their scales anew

    @staticmethod
    def of(quantizer: Quantizer, codes: Tensor, shape: Sequence[int]) -> PackedWeight:
        """Packs the codes of a quantizer.

        Args:
            quantizer: with one scale a row.
            codes: uint8 `[rows, n]`, rows of the granularity.
            shape: `[out, in, ...]` of the weight.
        """
        fmt = quantizer.format
        packed = pack(codes.reshape(shape[0], -1), fmt.bits).view(NATIVE_TYPES.get(fmt.name, torch.uint8))
        scale = quantizer.current_scale().detach()
        rows = 1 if scale.numel() == 1 else shape[0]
        offset = None if quantizer.offset is None else quantizer.offset.reshape(rows, -1)
        if quantizer.scale_format is not None:
            return BlockScaledWeight(fmt, shape, packed, scale.reshape(shape[0], -1), quantizer.scale_format)
        return PackedWeight(fmt, shape, packed, scale.reshape(rows, -1), offset)

    @staticmethod
    def empty(entry: Mapping[str, Any], shape: Sequence[int]) -> PackedWeight:
        """A weight without contents, on the meta device, from what `describe` said.

        Raises:
            ValueError: if it says what cannot be.
        """
        fmt = parse_format(entry["format"])
        out, n = shape[0], math.prod(shape[1:])
        rows, groups = entry["scales"]
        if not (groups >= 1 and n % groups == 0 and rows in (1, out) and (rows == out or groups == 1)):
            raise ValueError(f"scales [{rows}, {groups}] do not go with a weight of {out} rows of {n}")
        kind = NATIVE_TYPES.get(fmt.name, torch.uint8)
        codes = torch.empty(out, packed_length(n, fmt.bits), dtype=kind, device="meta")
        scale = torch.empty(rows, groups, dtype=torch.float32, device="meta")
        name = entry.get("scale_format", FLOAT32)
        if name != FLOAT32:
            if name not in SCALE_FORMATS or rows != out or entry["offset"]:
                raise ValueError(f"scales [{rows}, {groups}] of {name} do not go with a weight of {out} rows of {n}")
            return BlockScaledWeight(fmt, shape, codes, scale, SCALE_FORMATS[name])
        return PackedWeight(fmt, shape, codes, scale, torch.empty_like(scale) if entry["offset"] else None)

    def describe(self) -> dict[str, Any]:
        """Format, shape of the scales, and whether there is an offset: plain types."""
        return {
            "format": self.format.name,
            "scales": list(self.scale.shape),
            "offset": self.offset is not None,
        }

    @property
    def bytes(self) -> Tensor:
        """The packed rows as uint8."""
        return self.codes.view(torch.uint8)

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in, ...]`, float32 rounded to a type."""
        return ops.decode(self.codes, self.format, self.shape, self.scale, self.offset, dtype)


class BlockScaledWeight(PackedWeight):
    """A packed weight whose group scales have a format of their own; `scale` decodes them.

    Args:
        fmt: the number format.
        shape: `[out, in, ...]` of the weight.
        codes: as of `PackedWeight`.
        scale: float32 `[out, groups]`, numbers of `scale_format`.
        scale_format: of the scales.

    Attributes:
        block_scale: codes of the scales, `[out, groups]`, in the type of the scale format.
        tensor_scale: float32 `[]`, a factor of all scales; None where the format has none.

    Raises:
        ValueError: if a scale is not of the format.
    """

    block_scale: Tensor
    tensor_scale: Tensor | None

    def __init__(
        self, fmt: Format, shape: Sequence[int], codes: Tensor, scale: Tensor, scale_format: ScaleFormat
    ) -> None:
        self.scale_format = scale_format
        super().__init__(fmt, shape, codes, scale, None)

    def _keep_scale(self, scale: Tensor) -> None:
        block_scale, tensor_scale = self.scale_format.encode(scale)
        self.register_buffer("block_scale", block_scale)
        self.register_buffer("tensor_scale", tensor_scale if self.scale_format.relative else None)

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The scales that the values are multiplied by, float32 `[out, groups]`."""
        scale = self.scale_format.decode(self.block_scale.view(torch.uint8))
        return scale if self.tensor_scale is None else scale * self.tensor_scale

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "scale_format": self.scale_format.name}


class PackedLayer(SplitLayer):
    """Mixin of the packed layer classes; use `make_packed` to turn a layer into one.

    Attributes:
        shape: `[out, in, ...]` of the weight.
        weights: the packed parts of the weight; empty where the weight is in full precision.
        inputs: the quantizers of the parts of the input; empty where it is in full precision.
        low_bit_paths: those that its formats and scales allow.
        arithmetic: what it may run on; see `set_arithmetic`.
    """

    shape: tuple[int, ...]
    weights: Sequence[PackedWeight]
    inputs: Sequence[Quantizer]
    type_of_weight: Tensor
    low_bit_paths: tuple[Path, ...]
    arithmetic: Arithmetic = "native"
    _plan: tuple[torch.device, torch.dtype, Plan] | None = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The decoded weight, in the type that the layer was cast to, for whoever reads it."""
        stored = self._parameters.get("weight")
        if stored is not None:
            return stored
        decoded = self.decode_weight().to(self.type_of_weight.dtype)
        traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        return decoded if traced else decoded.as_subclass(DecodedWeight)

    def decode_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight from its codes `[out, in, ...]`, float32 rounded to a type."""
        parts = [part(dtype) for part in self.weights]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def simulate(self, x: Tensor) -> Tensor:
        """Runs the layer on a decoded weight and an input that was quantized and dequantized."""
        weight = self.decode_weight(x.dtype) if len(self.weights) else self.weight
        return self.operate(self.quantize_input(x, self.inputs), weight, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_plan": None}  # of this machine

    def forward(self, input: Tensor) -> Tensor:
        """Runs the layer on the best path of its device."""
        x = input
        if len(self.weights) and self.weights[0].codes.device != x.device:
            return self.simulate(x)  # calls the parts, whose hooks bring them to the device
        if torch.compiler.is_compiling():
            return run(self, x, plan_for(self.low_bit_paths, x.device, x.dtype, self.arithmetic))
        planned = self._plan
        if planned is None or planned[:2] != (x.device, x.dtype):
            planned = self._plan = (x.device, x.dtype, plan_for(self.low_bit_paths, x.device, x.dtype, self.arithmetic))
        return run(self, x, planned[2])

    def describe(self) -> dict[str, Any]:
        """All of the layer that is not in its tensors: plain types, which `make_empty` reads."""
        return {
            "shape": list(self.shape),
            "splits": list(self.splits),
            "weights": [part.describe() for part in self.weights],
            "inputs": [describe_quantizer(q) for q in self.inputs],
        }


def describe_quantizer(quantizer: Quantizer) -> dict[str, Any]:
    """All of a quantizer that is not in its tensors: plain types, which `empty_quantizer` reads."""
    return {
        "format": quantizer.format.name,
        "token_dims": list(quantizer.token_dims) if quantizer.scale is None else None,
        "offset": quantizer.offset is not None,
    }


def empty_quantizer(entry: Mapping[str, Any]) -> Quantizer:
    """A quantizer whose tensors are to be loaded."""
    scale, offset = (torch.empty((), dtype=torch.float32, device="meta") for _ in range(2))
    dims = entry["token_dims"]
    if dims is not None and not all(isinstance(d, int) and abs(d) < 6 for d in dims):
        raise ValueError(f"token_dims {dims} are no dimensions")
    scales = (scale if dims is None else None, offset if entry["offset"] else None)
    return Quantizer(parse_format(entry["format"]), *scales, *(() if dims is None else (tuple(dims),)))


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[misc, override]
    """`torch.nn.Linear` with a packed weight."""


class PackedConv1d(PackedLayer, nn.Conv1d):  # type: ignore[misc, override]
    """`torch.nn.Conv1d` with a packed weight."""


class PackedConv2d(PackedLayer, nn.Conv2d):  # type: ignore[misc, override]
    """`torch.nn.Conv2d` with a packed weight."""


class PackedConv3d(PackedLayer, nn.Conv3d):  # type: ignore[misc, override]
    """`torch.nn.Conv3d` with a packed weight."""


PACKED_CLASSES: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
    nn.Conv3d: PackedConv3d,
}


def set_arithmetic(module: nn.Module, arithmetic: Arithmetic) -> None:
    """Chooses what the packed layers below a module run on.

    Args:
        module: a model, or a part of one.
        arithmetic: ``native`` for the best path of the device; ``simulated`` for decoded weights and inputs that were
            quantized and dequantized, as the model was calibrated.

    Raises:
        ValueError: if there is no such arithmetic.
    """
    if arithmetic not in get_args(Arithmetic):
        raise ValueError(f"there is no arithmetic {arithmetic!r}: use {' or '.join(get_args(Arithmetic))}")
    for layer in packed_layers(module).values():
        layer.arithmetic, layer._plan = arithmetic, None


def packed_layers(module: nn.Module) -> dict[str, PackedLayer]:
    """The packed layers below a module by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, PackedLayer)}


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
    packed, weight = cast(PackedLayer, layer), cast(Tensor, layer.weight)
    device = "cpu" if weight.is_meta else weight.device  # for it is not loaded
    _strip(layer)
    if len(weights):
        del layer._parameters["weight"]
    layer.__class__ = next(cls for plain, cls in PACKED_CLASSES.items() if isinstance(layer, plain))
    packed.shape, packed.splits = tuple(weight.shape), tuple(splits)
    packed.weights, packed.inputs = as_modules(weights), as_modules(inputs)
    if packed.bias is not None:
        packed.bias.requires_grad_(False)  # low-bit products have no gradient
    packed.register_buffer("type_of_weight", torch.empty(0, dtype=weight.dtype, device=device), persistent=False)
    packed.low_bit_paths = low_bit_paths(packed)
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


def keep_learned_attention(model: nn.Module) -> dict[str, QuantizedAttention]:
    """Drops all but the learned variant of attention, as files hold that alone; the modules that have it, by name."""
    found = {name: m for name, m in quantized_attention(model).items() if "quantized" in m.variants}
    for module in found.values():
        module.variants = nn.ModuleDict({"quantized": module.variants["quantized"]})
    return found


def describe_attention(module: QuantizedAttention) -> list[dict[str, Any]]:
    """`describe_quantizer` of the operands of attention, for one call after the other."""
    return [describe_quantizer(q) for q in cast(LayerQuantization, module.variants["quantized"]).inputs]


def make_attention_empty(module: nn.Module, name: str, entry: Sequence[Mapping[str, Any]]) -> None:
    """Makes the attention of a module quantized, with scales that are to be loaded.

    Raises:
        ValueError: if the description does not say the operands of whole calls.
    """
    if not entry or len(entry) % len(OPERANDS):
        raise ValueError(f"{len(entry)} quantizers for attention, expected {len(OPERANDS)} a call")
    attention = make_attention_quantized(module, name, len(entry) // len(OPERANDS))
    attention.variants["quantized"] = LayerQuantization(inputs=[empty_quantizer(q) for q in entry])
    attention.set_mode("quantized")


def make_plain(layer: PackedLayer | QuantizedLayer, dtype: torch.dtype = torch.float32) -> None:
    """Turns a layer into the plain class in place, with the values of its quantized weight, if it has one."""
    weight, bias = quantized_weight(layer), layer.bias
    if isinstance(layer, QuantizedLayer) and "quantized" in layer.variants:
        corrected = cast(LayerQuantization, layer.variants["quantized"]).bias
        bias = bias if corrected is None else nn.Parameter(corrected.detach().clone(), requires_grad=False)
    plain: Any = layer
    _strip(plain)
    plain.__class__ = next(kind for kind in PACKED_CLASSES if isinstance(layer, kind))
    plain.weight = nn.Parameter(weight.detach().to(dtype).clone(), requires_grad=False)
    plain.bias = bias


def quantized_weight(layer: PackedLayer | QuantizedLayer) -> Tensor:
    """The weight that is stored of a layer, float32 where it is quantized."""
    if isinstance(layer, PackedLayer):
        return layer.decode_weight() if len(layer.weights) else layer.weight
    if "quantized" in layer.variants:
        return layer.quantized_weight(cast(LayerQuantization, layer.variants["quantized"]))
    return layer.weight


_OWN_ATTRIBUTES = (
    "splits", "shape", "granularity", "mode", "_effective_weight", "arithmetic", "low_bit_paths", "_plan", "weights",
    "inputs",
)  # fmt: skip


def _strip(layer: nn.Module) -> None:
    """Leaves of a calibrated or packed layer what a plain Linear or Conv layer has."""
    layer._modules.clear()
    layer._buffers.clear()
    for name in _OWN_ATTRIBUTES:
        layer.__dict__.pop(name, None)
