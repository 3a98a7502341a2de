"""Linear and Conv layers whose weights are packed codes; `fpq_lightning.nn.convert` makes them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fpq_lightning.nn.backends import decode
from fpq_lightning.nn.backends.paths import Arithmetic, Plan, plan_for, run
from fpq_lightning.nn.decoded_weight import DecodedWeight
from fpq_lightning.nn.input_quantizer import describe_quantizer
from fpq_lightning.nn.operands import Operands
from fpq_lightning.nn.packed_weight import PackedWeight
from fpq_lightning.nn.split_layer import SplitLayer
from fpq_lightning.quantization.quantizer import Quantizer


class _PackedMetadata(dict[str, Any]):
    """The entry of a packed layer in the metadata of a state dict, which layers that are not packed refuse.

    torch asks it for options when a layer loads the state. Packed layers take a plain copy first.
    """

    def get(self, key: str, default: Any = None) -> Any:
        raise ValueError(
            "a layer that is not packed cannot load the state of a packed one: call dequantize() of the quantized "
            "model first, or take the full-precision model"
        )

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())


class PackedLayer(SplitLayer):
    """Mixin of the packed layer classes; use `make_packed` to turn a layer into one.

    Attributes:
        shape: `[out, in, ...]` of the weight.
        weights: the packed parts of the weight; empty where the weight is in full precision.
        inputs: the quantizers of the parts of the input; empty where it is in full precision.
        type_of_weight: without elements, of the type that the layer was cast to.
        paths: names of the arithmetic paths that its operands fit, best first.
        arithmetic: what it may run on; see `set_arithmetic`.
    """

    shape: tuple[int, ...]
    weights: Sequence[PackedWeight]
    inputs: Sequence[Quantizer]
    type_of_weight: Tensor
    paths: tuple[str, ...]
    arithmetic: Arithmetic
    _plan: tuple[torch.device, torch.dtype, Plan] | None  # the last one; it is of this machine

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The decoded weight, in the type that the layer was cast to, for whoever reads it."""
        stored = self._parameters.get("weight")  # this property hides it
        if stored is not None:
            return stored
        decoded = self.decode_weight().to(self.type_of_weight.dtype)
        traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        return decoded if traced else decoded.as_subclass(DecodedWeight)

    @property
    def operands(self) -> Operands:
        """What its input is multiplied with."""
        return Operands(tuple(self.weights), tuple(self.inputs), self.splits, self.bias, self.convolution)

    def decode_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight from its codes `[out, in, ...]`, float32 rounded to a type."""
        return self.operands.decode_weight(dtype)

    def simulate(self, x: Tensor) -> Tensor:
        """Runs the layer on a decoded weight and an input that was quantized and dequantized."""
        return decode.run(x, self.operands)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]] = _PackedMetadata(destination._metadata[prefix[:-1]])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        if len(self.weights) and f"{prefix}weight" in state_dict:
            raise ValueError(
                f"{prefix}weight: a packed layer cannot load a plain weight: call dequantize() of its model first"
            )
        super()._load_from_state_dict(state_dict, prefix, dict(local_metadata), *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_plan": None}

    def forward(self, input: Tensor) -> Tensor:
        """Runs the layer on the best path of its device."""
        x, operands = input, self.operands
        if not operands.weights:
            return self.operate(self.quantize_input(x, operands.inputs), self.weight, operands.bias)
        if operands.weights[0].codes.device != x.device:
            return decode.run(x, operands)  # calls the parts, whose hooks bring them to the device
        if torch.compiler.is_compiling():
            return run(plan_for(self.paths, x.device, x.dtype, self.arithmetic), x, operands)
        planned = self._plan
        if planned is None or planned[:2] != (x.device, x.dtype):
            planned = self._plan = (x.device, x.dtype, plan_for(self.paths, x.device, x.dtype, self.arithmetic))
        return run(planned[2], x, operands)

    def describe(self) -> dict[str, Any]:
        """All of the layer that is not in its tensors: plain types, which `make_empty` reads."""
        return {
            "shape": list(self.shape),
            "splits": list(self.splits),
            "weights": [part.describe() for part in self.weights],
            "inputs": [describe_quantizer(q) for q in self.inputs],
        }


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[misc, override]
    """`torch.nn.Linear` with a packed weight."""

    plain = nn.Linear


class PackedConv1d(PackedLayer, nn.Conv1d):  # type: ignore[misc, override]
    """`torch.nn.Conv1d` with a packed weight."""

    plain = nn.Conv1d


class PackedConv2d(PackedLayer, nn.Conv2d):  # type: ignore[misc, override]
    """`torch.nn.Conv2d` with a packed weight."""

    plain = nn.Conv2d


class PackedConv3d(PackedLayer, nn.Conv3d):  # type: ignore[misc, override]
    """`torch.nn.Conv3d` with a packed weight."""

    plain = nn.Conv3d


PACKED_CLASSES: dict[type[nn.Module], type[PackedLayer]] = {
    kind.plain: kind for kind in (PackedLinear, PackedConv1d, PackedConv2d, PackedConv3d)
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
