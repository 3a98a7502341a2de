"""How diffusers loads packed files, and quantizes full-precision ones: its quantizer of the method ``fpq``.

Importing this module makes it known, so that ``from_pretrained`` of any model or pipeline opens packed files.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from fpq_lightning.nn.packed_layer import packed_layers
from fpq_lightning.quantization.quantizer import ExactBuffers
from fpq_lightning.storage import version_2
from fpq_lightning.storage.config import FPQConfig, QuantizationMethod
from fpq_lightning.storage.headers import StoredTensor, check_names, read_header
from fpq_lightning.storage.layers import (
    check_scales,
    dequantize,
    make_layers_empty,
    own_config,
    quantize_layer,
    select_layers,
)
from fpq_lightning.storage.opened import forget_config, know_weights, refuse_template, state_to_save
from fpq_lightning.utils.alignment import align
from fpq_lightning.utils.reading import check_inside


class FPQQuantizer(DiffusersQuantizer):
    """Makes the layers of a model packed ones before its files are read, or one by one while they are.

    Args:
        quantization_config: of the files, or of the user.
    """

    use_keep_in_fp32_modules = True
    quantization_config: FPQConfig

    def __init__(self, quantization_config: FPQConfig, **kwargs: Any) -> None:
        pre_quantized = kwargs.pop("pre_quantized", quantization_config.layers is not None)
        super().__init__(own_config(quantization_config, pre_quantized), pre_quantized=pre_quantized, **kwargs)
        self.files: list[str] = []
        self.selected: set[str] = set()  # weights to quantize
        self.modules: dict[str, nn.Module] = {}  # of the model, by name, while it is loaded: a network has thousands
        self.devices: Mapping[str, Any] = {"": "cpu"}  # of tensors, or of modules and all below them
        self.dtype = torch.float32
        self.casts = False  # some tensors to float32, whatever `dtype` is
        self.model: weakref.ref[nn.Module] | None = None  # that was opened; it has this quantizer
        self.opened: frozenset[str] = frozenset()  # names of its tensors then

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "model": None}  # of a copy of the model, weak references are no use

    @property
    def is_serializable(self) -> bool:
        """Whether `save_pretrained` may write the model, which asks before it writes anything.

        Raises:
            ValueError: if what it wrote could not be opened.
        """
        model = None if self.model is None else self.model()
        if model is not None:
            state_to_save(model.state_dict(), self.opened)
        return True

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not safe_serialization:
            raise ValueError("packed weights are saved as safetensors only: leave safe_serialization=False out")
        return state_to_save(state_dict, self.opened), {}

    @property
    def is_trainable(self) -> bool:
        """Whether the quantized weights can be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` takes the model."""
        return True

    @property
    def supports_parallel_loading(self) -> bool:
        """Whether threads may read the files."""
        return False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict):
            if "disk" in device_map.values():
                raise ValueError("fpq: layers cannot be offloaded to the disk: choose a device_map without disk")
            self.devices = device_map

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        self.dtype = torch_dtype or self.dtype
        return torch_dtype

    def get_cuda_warm_up_factor(self) -> int:
        # Memory is reserved for elements of `dtype`, by one for so many of the model's: most are codes of a byte.
        return self.dtype.itemsize if self.pre_quantized else super().get_cuda_warm_up_factor()

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self.files = [str(file) for file in checkpoint_files]
        return [self._current_name(key) for key in loaded_keys]

    def _current_name(self, tensor: str) -> str:
        return version_2.current_name(tensor) if self.quantization_config.format_version == 2 else tensor

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: Sequence[str] = (), **kwargs: Any
    ) -> None:
        kept = [name for name in keep_in_fp32_modules if name]
        if self.pre_quantized:
            self.casts = bool(kept)
            with _no_garbage_collection():
                self._prepare_packed(model)
        else:
            self.modules = dict(model.named_modules())
            self.selected = {f"{name}.weight" for name in select_layers(model, self.quantization_config, kept)}

    def _prepare_packed(self, model: nn.Module) -> None:
        make_layers_empty(model, self.quantization_config)
        if foreign := [file for file in self.files if not file.endswith(".safetensors")]:
            raise ValueError(f"{foreign[0]} is no safetensors file, and no other is read")
        self.modules = dict(model.named_modules(remove_duplicate=False))
        if self.files:
            for file in map(Path, self.files):
                check_inside(file, file.parent)
            stored = {name: tensor for file in self.files for name, tensor in read_header(file).items()}
            found = {self._current_name(name): tensor for name, tensor in stored.items()}
            _check_tensors(self.modules, found)

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        # Codes and scales, which diffusers would cast, are put in their places here; what needs no cast as well, since
        # diffusers takes long for each tensor.
        left: dict[str, Tensor] = {}
        for stored_name, value in state_dict.items():
            name = self._current_name(stored_name)
            parent_name, _, key = name.rpartition(".")
            parent = self.modules.get(parent_name) if self.pre_quantized else None
            held = None if parent is None or self.casts else parent._parameters.get(key)
            if isinstance(parent, ExactBuffers):
                parent._buffers[key] = value.to(self._device_of(name), non_blocking=True)
            elif held is not None and value.dtype == held.dtype == self.dtype and value.shape == held.shape:
                placed = value.to(self._device_of(name), non_blocking=True)
                cast(nn.Module, parent)._parameters[key] = nn.Parameter(placed, held.requires_grad)
            else:
                left[name] = value
        return left

    def _device_of(self, tensor: str) -> Any:
        name = tensor
        while name and name not in self.devices:
            name = name.rpartition(".")[0]
        if name not in self.devices:
            raise ValueError(f"device_map says no device for {tensor}")
        return self.devices[name]

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: Mapping[str, Any], **kwargs: Any
    ) -> bool:
        return param_name in self.selected

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: Mapping[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        weight = state_dict[param_name].to(target_device)  # `param_value` was cast to the type of the model
        layer = self.modules[param_name.rpartition(".")[0]]
        quantize_layer(layer, param_name, weight, self.quantization_config.recipe)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            check_scales(self.modules)
        else:
            self.quantization_config.layers = {name: m.describe() for name, m in packed_layers(model).items()}
        align(model)
        self.modules = {}  # the model has this quantizer: each would keep the other until garbage is collected
        model.register_to_config(quantization_config=self.quantization_config)
        refuse_template(model)
        model._register_state_dict_hook(know_weights)
        self.opened, self.model = frozenset(model.state_dict()), weakref.ref(model)
        model.is_quantized = False  # or diffusers refuses to cast it, which codes and scales take no harm from
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        dequantize(model)
        forget_config(model)
        return model


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Looking for garbage among all objects takes longer than making a network's layers, none of which is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_tensors(modules: Mapping[str, nn.Module], found: Mapping[str, StoredTensor]) -> None:
    """Compares what files hold with what the modules of a model need.

    Raises:
        ValueError: if a tensor is missing, too much, or of another type or shape.
    """
    expected = {
        f"{name}.{key}".lstrip("."): (module, value)
        for name, module in modules.items()
        for key, value in (module._parameters | module._buffers).items()
        if value is not None and key not in module._non_persistent_buffers_set
    }
    check_names(expected, found)
    for tensor, (module, value) in expected.items():
        there, wanted = found[tensor], StoredTensor.of(value)
        if not (there == wanted if isinstance(module, ExactBuffers) else there.may_be(wanted)):
            raise ValueError(f"{tensor} is {there} in the files, but should be {wanted}")


def check_fits(model: Any, empty: nn.Module) -> None:
    """Compares a packed model with an empty one of its configuration, as files of it would be.

    Raises:
        ValueError: if its files could not be opened.
    """
    make_layers_empty(empty, model.config.quantization_config)
    found = {name: StoredTensor.of(tensor) for name, tensor in model.state_dict().items()}
    _check_tensors(dict(empty.named_modules(remove_duplicate=False)), found)


AUTO_QUANTIZER_MAPPING[QuantizationMethod.FPQ.value] = FPQQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[QuantizationMethod.FPQ.value] = FPQConfig
