"""How transformers loads packed files, and quantizes full-precision ones: its quantizer of the method ``fpq``.

Importing this module makes it known, so that ``from_pretrained`` of any text encoder opens packed files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from fpq_lightning.nn.packed_layer import packed_layers
from fpq_lightning.quantization.quantizer import ExactBuffers
from fpq_lightning.storage.config import FPQConfig, QuantizationMethod
from fpq_lightning.storage.headers import FLOATS, STORED_TYPES, read_header
from fpq_lightning.storage.layers import (
    check_scales,
    dequantize,
    make_layers_empty,
    own_config,
    quantize_layer,
    select_layers,
)
from fpq_lightning.storage.opened import state_to_save
from fpq_lightning.utils.alignment import align
from fpq_lightning.utils.reading import check_inside

_LOADED = "_is_hf_initialized"
"""What transformers marks tensors and modules with, which it would otherwise fill with random numbers."""


class FPQTransformersQuantizer(HfQuantizer):
    """Makes the layers of a model packed ones before its files are read, or one by one while they are.

    Args:
        quantization_config: of the files, or of the user.
    """

    quantization_config: FPQConfig

    def __init__(self, quantization_config: FPQConfig, **kwargs: Any) -> None:
        pre_quantized = kwargs.pop("pre_quantized", quantization_config.layers is not None)
        super().__init__(own_config(quantization_config, pre_quantized), pre_quantized=pre_quantized, **kwargs)
        self.selected: set[str] = set()  # weights to quantize
        self.exact: dict[str, torch.dtype] = {}  # types of codes and scales, which are not cast
        self.plain: frozenset[str] = frozenset()  # names of the other tensors
        self.opened: frozenset[str] = frozenset()  # names of the model's tensors when it was opened

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` may write the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the quantized weights can be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` takes the model."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("fpq: layers cannot be offloaded to the disk: choose a device_map without disk")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            for file in map(Path, kwargs.get("checkpoint_files") or ()):
                check_inside(file, file.parent)
                read_header(file)
            make_layers_empty(model, self.quantization_config)
            self.plain = frozenset(name for name, value in model.named_parameters() if value.is_floating_point())
            for layer in packed_layers(model).values():
                setattr(layer, _LOADED, True)
            self.exact = {name: tensor.dtype for name, tensor in _exact_tensors(model).items()}
        else:
            tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
            kept = [*tied, *(model._keep_in_fp32_modules or ())]
            self.selected = {f"{name}.weight" for name in select_layers(model, self.quantization_config, kept)}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.selected

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        for name in self.exact.keys() & converter.target_patterns:
            wanted = STORED_TYPES[self.exact[name]]
            if hasattr(param, "get_dtype") and param.get_dtype() != wanted:  # of a file that is not read yet
                raise ValueError(f"{name} is {param.get_dtype()} in the files, but should be {wanted}")
            return None
        for name in self.plain & {*converter.target_patterns}:
            if hasattr(param, "get_dtype") and param.get_dtype() not in FLOATS:
                raise ValueError(
                    f"{name} is {param.get_dtype()} in the files, but should be one of {', '.join(FLOATS)}"
                )
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            tensors = _exact_tensors(model).items()
            if missing := [name for name, tensor in tensors if not getattr(tensor, _LOADED, False)]:
                more = f" and {len(missing) - 1} more" * (len(missing) > 1)
                raise ValueError(f"the files lack {missing[0]}{more}")
            check_scales(dict(model.named_modules()))
        else:
            self.quantization_config.layers = {name: m.describe() for name, m in packed_layers(model).items()}
        align(model)
        self.opened = frozenset(model.state_dict())
        model.is_quantized = False  # or transformers refuses to cast it, which codes and scales take no harm from
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # nothing but the adapter is written
        return state_to_save(model.state_dict(), self.opened), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize(model)
        return model


class _Quantize(ConversionOps):
    """Makes a layer a packed one when its weight was read."""

    def __init__(self, hf_quantizer: FPQTransformersQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Any = None,
        target_patterns: Any = None,
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        (found,) = input_dict.values()
        weight = found[0] if isinstance(found, list) else found
        layer = model.get_submodule(full_layer_name.rpartition(".")[0])
        packed = quantize_layer(layer, full_layer_name, weight, self.hf_quantizer.quantization_config.recipe)
        setattr(packed, _LOADED, True)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def _exact_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that keep their types: codes and scales."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if isinstance(module, ExactBuffers)
        for key, value in module._buffers.items()
        if value is not None
    }


AUTO_QUANTIZER_MAPPING[QuantizationMethod.FPQ.value] = FPQTransformersQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[QuantizationMethod.FPQ.value] = FPQConfig
