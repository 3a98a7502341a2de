"""Linear and Conv layers that are being calibrated.

The full-precision weight stays, so that a layer can run in any of its modes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from fpq_lightning.nn.split_layer import SplitLayer
from fpq_lightning.nn.swap import SwappedModule
from fpq_lightning.quantization.quantizer import Granularity, Quantizer
from fpq_lightning.quantization.rounding import LearnedRounding

Mode = Literal["full_precision", "nearest", "closed_form", "quantized"]


M = TypeVar("M", bound=nn.Module)


def as_modules(modules: Sequence[M]) -> Sequence[M]:
    """Modules to be held as an attribute; a network has thousands of such, most of them empty, which are no module."""
    return cast(Sequence[M], nn.ModuleList(modules) if len(modules) else ())


class LayerQuantization(nn.Module):
    """How one layer is quantized: a weight and an input quantizer for each part of its input channels.

    Attention is a layer without a weight whose inputs are the operands of its products.

    Attributes:
        weights: one quantizer a part; empty leaves the weight as it is.
        inputs: one quantizer a part, or an operand; empty leaves the input as it is.
        roundings: the rounding variables of each part while they are learned.
        codes: chosen codes of each part (uint8 rows); None rounds the weight to nearest.
        unrounded: what `codes` were rounded from, float32 rows of each part, to start learning from; None for the
            weight.
        bias: replaces the layer's bias (learned or corrected), float32 `[out]`, or None.
    """

    weights: Sequence[Quantizer]
    inputs: Sequence[Quantizer]
    roundings: Sequence[LearnedRounding]
    bias: nn.Parameter | None

    def __init__(self, weights: Sequence[Quantizer] = (), inputs: Sequence[Quantizer] = ()) -> None:
        super().__init__()
        self.weights = as_modules(weights)
        self.inputs = as_modules(inputs)
        self.roundings = ()
        self.codes: list[Tensor] | None = None
        self.unrounded: list[Tensor] | None = None
        self.register_parameter("bias", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerQuantization:
        super()._apply(fn, recurse)
        for name in ("codes", "unrounded"):
            if (parts := getattr(self, name)) is not None:
                setattr(self, name, [fn(part) for part in parts])
        return self

    def set_bias(self, bias: Tensor) -> None:
        """Replaces the layer's bias."""
        self.bias = nn.Parameter(bias.detach().float().clone(), requires_grad=False)

    def copy(self) -> LayerQuantization:
        """An independent copy."""
        return copy.deepcopy(self)

    def start_learning(self, rows: Sequence[Tensor], scale_aware: bool) -> None:
        """Gives every weight part its rounding variables.

        Args:
            rows: the full-precision weight parts, of `QuantizedLayer.weight_rows`.
            scale_aware: see `LearnedRounding`.
        """
        pairs = zip(self.weights, self.unrounded or rows, strict=True)
        self.roundings = as_modules([LearnedRounding(q, part, scale_aware) for q, part in pairs])

    def finish_learning(self) -> None:
        """Hardens the rounding variables to codes and freezes everything."""
        if self.roundings:
            self.codes = [rounding.codes() for rounding in self.roundings]
            del self.roundings
            self.roundings = ()
        self.unrounded = None
        for quantizer in [*self.weights, *self.inputs]:
            quantizer.freeze_scale()
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def to_state(self) -> dict[str, Any]:
        """Tensors and plain types that `from_state` reads."""
        return {
            "weights": [q.to_state() for q in self.weights],
            "inputs": [q.to_state() for q in self.inputs],
            "codes": self.codes,
            "unrounded": self.unrounded,
            "bias": None if self.bias is None else self.bias.detach(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> LayerQuantization:
        """The inverse of `to_state`."""
        quantization = cls(*([Quantizer.from_state(q) for q in state[key]] for key in ("weights", "inputs")))
        if state["bias"] is not None:
            quantization.set_bias(state["bias"])
        quantization.codes, quantization.unrounded = state["codes"], state["unrounded"]
        return quantization.to(device)


class Variants(nn.ModuleDict):
    """The quantizations of a module by mode."""

    def __getitem__(self, key: str) -> LayerQuantization:
        return cast(LayerQuantization, super().__getitem__(key))


class QuantizedModule(SwappedModule):
    """What runs quantized in one mode and in full precision in another.

    Attributes:
        variants: its quantizations by mode.
        mode: the one in force.
    """

    variants: Variants
    mode: Mode

    @property
    def quantization(self) -> LayerQuantization | None:
        """The quantization in force, None in full precision."""
        return None if self.mode == "full_precision" else self.variants[self.mode]

    def set_mode(self, mode: Mode) -> None:
        """Chooses the variant that `forward` runs."""
        self.mode = mode


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a Linear or Conv layer among the arguments of a call, as hooks get them."""
    return cast(Tensor, args[0] if args else kwargs["input"])


class QuantizedLayer(SplitLayer, QuantizedModule):
    """Mixin of the layer classes that can be calibrated; use `make_quantized` to turn a layer into one.

    Attributes:
        granularity: how many scales each weight part has.
    """

    granularity: Granularity
    _effective_weight: Tensor | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        self._effective_weight = None
        return super()._apply(fn, recurse)

    def set_mode(self, mode: Mode) -> None:
        super().set_mode(mode)
        self._effective_weight = None

    def weight_parts(self) -> tuple[Tensor, ...]:
        """The full-precision weight, float32, cut along its input channels."""
        return self.weight.detach().float().split(self.splits, dim=1)

    def weight_rows(self) -> list[Tensor]:
        """The parts of the weight as rows `[n_rows, n]` of the granularity."""
        return [self.granularity.rows(part) for part in self.weight_parts()]

    def from_rows(self, rows: Sequence[Tensor]) -> Tensor:
        """Puts rows of the parts together to a weight."""
        shape = self.weight.shape
        if len(rows) == 1:
            return rows[0].reshape(shape)
        parts = zip(rows, self.splits, strict=True)
        return torch.cat([r.reshape(shape[0], split, *shape[2:]) for r, split in parts], dim=1)

    def quantized_weight(self, quantization: LayerQuantization) -> Tensor:
        """The weight on the grid, or between two grid values where its rounding is being learned."""
        if not quantization.weights:
            return self.weight
        if quantization.roundings:
            return self.from_rows([r() for r in quantization.roundings])
        with torch.no_grad():
            if quantization.codes is not None:
                pairs = zip(quantization.weights, quantization.codes, strict=True)
                return self.from_rows([q.decode(codes.to(self.weight.device)) for q, codes in pairs])
            return self.from_rows([q(r) for q, r in zip(quantization.weights, self.weight_rows(), strict=True)])

    def forward(self, input: Tensor) -> Tensor:
        """Runs the layer in its mode."""
        x, mode = input, self.mode
        if mode == "full_precision":
            return self.operate(x, self.weight, self.bias)
        # Not `self.quantization` and `.bias`, whose lookups take 2.7 us more of the 33 us of a small layer on a CPU.
        quantization = cast(LayerQuantization, cast(Variants, self._modules["variants"])._modules[mode])
        bias = quantization._parameters["bias"]
        if bias is None:
            bias = self._parameters["bias"]
        if quantization.roundings:
            weight = self.quantized_weight(quantization)
        else:
            kept = self._effective_weight
            if kept is None or kept.device != x.device or kept.dtype != x.dtype:
                kept = self._effective_weight = self.quantized_weight(quantization).detach().to(x.device, x.dtype)
            weight = kept
        return self.operate(self.quantize_input(x, quantization.inputs), weight, bias)


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """`torch.nn.Linear` with quantized input and weight."""

    plain = nn.Linear


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):  # type: ignore[misc]
    """`torch.nn.Conv1d` with quantized input and weight."""

    plain = nn.Conv1d


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[misc]
    """`torch.nn.Conv2d` with quantized input and weight."""

    plain = nn.Conv2d


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):  # type: ignore[misc]
    """`torch.nn.Conv3d` with quantized input and weight."""

    plain = nn.Conv3d


QUANTIZED_CLASSES: dict[type[nn.Module], type[QuantizedLayer]] = {
    kind.plain: kind for kind in (QuantizedLinear, QuantizedConv1d, QuantizedConv2d, QuantizedConv3d)
}


def operation_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class of torch whose operation a class of layers computes, None if it may compute something else."""
    plain = next((plain for plain in QUANTIZED_CLASSES if issubclass(kind, plain)), None)
    computes = ("forward", "_conv_forward")
    return plain if all(getattr(kind, name, None) == getattr(plain, name, None) for name in computes) else None


def is_quantizable(module: nn.Module) -> bool:
    """Whether a module is a layer that `make_quantized` takes: an operation of torch with a weight of its own."""
    if isinstance(module, QuantizedLayer):
        return True
    return module._parameters.get("weight") is not None and operation_of(type(module)) is not None


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers below a module by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, QuantizedLayer)}


def quantized_modules(module: nn.Module) -> dict[str, QuantizedModule]:
    """The quantized layers and attention modules below a module by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, QuantizedModule)}


@contextmanager
def running(module: nn.Module, mode: Mode) -> Iterator[None]:
    """Runs what is quantized below a module in a mode; what lacks that variant stays in full precision."""
    found = quantized_modules(module).values()
    before = [(m, m.mode) for m in found]
    for m in found:
        m.set_mode(mode if mode in m.variants else "full_precision")
    try:
        yield
    finally:
        for m, previous in before:
            m.set_mode(previous)
