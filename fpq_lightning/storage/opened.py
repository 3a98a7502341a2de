"""What an opened model answers to diffusers and peft, which know nothing of packed layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fpq_lightning.nn.packed_layer import PackedLayer, packed_layers

_WRAPPERS = ("base_layer", "original_module")
"""What peft puts between the name of a layer and those of its tensors."""


def plain_name(name: str) -> str:
    """The name that a tensor or module of a model has without adapters."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


# --- state dicts ---------------------------------------------------------------------------------------------------


class StateDict(OrderedDict[str, Tensor]):
    """A state dict that also knows the weights of packed layers, decoded for whoever looks one up by its name.

    Loaders of adapters look up the weights that an adapter goes with. They are no entries: none is listed, or saved.
    """

    _metadata: Any  # torch's

    def __init__(
        self, entries: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = (), layers: Mapping[str, PackedLayer] = {}
    ) -> None:
        super().__init__(entries)
        self._layers = layers

    def __missing__(self, name: str) -> Tensor:
        layer, _, tensor = plain_name(name).rpartition(".")
        if tensor != "weight" or layer not in self._layers:
            raise KeyError(name)
        return self._layers[layer].weight

    def __reduce__(self) -> Any:  # what is saved or copied is one of torch's own
        state = {"_metadata": self._metadata} if hasattr(self, "_metadata") else None
        return OrderedDict, (), state, None, iter(self.items())


def know_weights(model: nn.Module, state: Any, prefix: str, metadata: Any) -> StateDict | None:
    """A hook that makes the state dict of a model one that knows the weights of its packed layers."""
    layers = {} if prefix else {plain_name(name): layer for name, layer in packed_layers(model).items()}
    if not layers:
        return None
    known = StateDict(state, layers)
    known._metadata = state._metadata
    return known


# --- saving --------------------------------------------------------------------------------------------------------


def state_to_save(state: Mapping[str, Tensor], opened: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a model under the names that they had when it was opened.

    Layers from which all adapters were deleted keep their wrappers, which rename the tensors.

    Args:
        state: of the model.
        opened: names of the tensors that it was opened with.

    Raises:
        ValueError: if it holds others, so that what was saved could not be opened.
    """
    found = {name if name in opened else plain_name(name): tensor for name, tensor in state.items()}
    if extra := next((name for name in found if name not in opened), None):
        if any(name not in opened and plain_name(name) in opened for name in state):
            raise ValueError(
                f"{extra} belongs to an adapter, which is not saved with a quantized model: write it with "
                "save_lora_adapter, take it off with delete_adapters (or open the model again), then save the model"
            )
        raise ValueError(f"{extra} was not in the model when it was opened: it cannot be saved, open it again")
    if missing := next((name for name in opened if name not in found), None):
        raise ValueError(f"{missing} was taken out of the model since it was opened: it cannot be saved, open it again")
    return found


# --- configurations ------------------------------------------------------------------------------------------------


class NoTemplate(list[str]):
    """The names of defaults in the configuration of a quantized model, which `from_config` refuses.

    Only `from_config` looks whether an option is among them. It would make a plain model, whose configuration says that
    it is quantized: what is then saved cannot be opened.
    """

    def __contains__(self, name: object) -> bool:
        raise ValueError(
            "this configuration is that of a quantized model, of which no other model is made: take the full-precision "
            "model, or call dequantize() of this one first"
        )


def refuse_template(model: Any) -> None:
    """Makes `from_config` refuse the configuration of a model."""
    model.register_to_config(_use_default_values=NoTemplate(model.config.get("_use_default_values", ())))


def forget_config(model: Any) -> None:
    """Makes the configuration of a model that of a plain one."""
    if not hasattr(model, "_internal_dict"):  # of transformers
        vars(model.config).pop("quantization_config", None)
        return
    kept = {k: v for k, v in model._internal_dict.items() if k != "quantization_config"}
    if "_use_default_values" in kept:
        kept["_use_default_values"] = list(kept["_use_default_values"])
    model._internal_dict = type(model._internal_dict)(kept)
