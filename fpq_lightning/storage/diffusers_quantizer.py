"""How diffusers loads packed files, and quantizes full-precision ones: its quantizer of the method ``fpq``.

Importing this module makes it known, so that ``from_pretrained`` of any model or pipeline opens packed files.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from fpq_lightning.formats.scales import parse_scale_format
from fpq_lightning.nn.attention import quantized_attention
from fpq_lightning.nn.calibrated import is_quantizable
from fpq_lightning.nn.convert import make_attention_empty, make_attention_plain, make_empty, make_packed, make_plain
from fpq_lightning.nn.packed_layer import PackedLayer, packed_layers
from fpq_lightning.nn.packed_weight import BlockScaledWeight, PackedWeight
from fpq_lightning.quantization.quantizer import ExactBuffers, Quantizer, layers_without_groups, without_groups
from fpq_lightning.quantization.search import search_tensor_error
from fpq_lightning.storage import version_2
from fpq_lightning.storage.config import FPQConfig, QuantizationMethod
from fpq_lightning.storage.headers import StoredTensor, read_header
from fpq_lightning.storage.opened import forget_config, know_weights, refuse_template, state_to_save

SCALES = ("scale", "block_scale", "tensor_scale")
"""Names of buffers that hold positive numbers."""

SMALLEST = 2.0**-149
"""Positive number of float32."""

_STORED_TYPES = {
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float32: "F32",
}


class FPQQuantizer(DiffusersQuantizer):
    """Makes the layers of a model packed ones before its files are read, or one by one while they are.

    Args:
        quantization_config: of the files, or of the user.
    """

    use_keep_in_fp32_modules = True
    quantization_config: FPQConfig

    def __init__(self, quantization_config: FPQConfig, **kwargs: Any) -> None:
        pre_quantized = kwargs.pop("pre_quantized", quantization_config.layers is not None)
        if not pre_quantized:
            quantization_config = copy.deepcopy(quantization_config)  # which is the user's to use again
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        if not pre_quantized and quantization_config.layers is not None:
            raise ValueError("this quantization_config is that of a quantized model: give a new FPQConfig")
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
            self._select(model, kept)

    def _prepare_packed(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for name, entry in (self.quantization_config.layers or {}).items():
            if name not in modules or not is_quantizable(modules[name]):
                raise ValueError(f"quantization_config names {name}, which is no Linear or Conv layer of the model")
            try:
                make_empty(modules[name], entry)
            except (ValueError, KeyError, TypeError, RuntimeError) as error:
                reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
                raise ValueError(f"quantization_config does not fit {name}: {reason}") from error
        attention = self.quantization_config.details.get("attention", {})
        if not isinstance(attention, Mapping):
            raise ValueError("quantization_config does not say what attention holds: it is damaged")
        for name, operands in attention.items():
            if name not in modules or is_quantizable(modules[name]):
                raise ValueError(f"quantization_config names {name}, which is no attention module of the model")
            try:
                make_attention_empty(modules[name], name, operands)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"quantization_config does not fit the attention of {name}: {error}") from error
        if foreign := [file for file in self.files if not file.endswith(".safetensors")]:
            raise ValueError(f"{foreign[0]} is no safetensors file, and no other is read")
        self.modules = dict(model.named_modules(remove_duplicate=False))
        if self.files:
            stored = {name: tensor for file in self.files for name, tensor in read_header(file).items()}
            found = {self._current_name(name): tensor for name, tensor in stored.items()}
            _check_tensors(self.modules, found)

    def _select(self, model: nn.Module, kept: Sequence[str]) -> None:
        config = self.quantization_config
        names = [name for name, module in self.modules.items() if is_quantizable(module)]
        excluded: set[str] = set()
        for pattern in [*config.modules_to_not_convert, *kept]:
            matched = {name for name in names if fnmatchcase(f".{name}.", f"*.{pattern}.*")}
            if not matched and pattern not in kept:
                raise ValueError(f"modules_to_not_convert: {pattern!r} matches none of the {len(names)} layers")
            excluded |= matched
        chosen = [name for name in names if name not in excluded]
        if not chosen:
            raise ValueError(f"{type(model).__name__} has no Linear or Conv layer that is to be quantized")
        granularity = config.recipe.granularity()
        weights = {name: cast(Tensor, self.modules[name].weight) for name in chosen}
        if unfit := layers_without_groups(granularity, weights):
            warnings.warn(without_groups(granularity, unfit), stacklevel=2)
        self.selected = {f"{name}.weight" for name in chosen}
        config.recipe.exclude = sorted(excluded)
        config.details["recipe"] = config.recipe.to_dict()

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

    @torch.no_grad()
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
        weight = state_dict[param_name].to(target_device).float()  # `param_value` was cast to the type of the model
        if not weight.isfinite().all():
            raise ValueError(f"{param_name} holds NaN or Inf: name its layer in modules_to_not_convert")
        recipe = self.quantization_config.recipe
        granularity = recipe.granularity().fitting([weight])
        rows = granularity.rows(weight)
        scale_format = parse_scale_format(granularity.scale_format)
        quantizer = search_tensor_error(rows, recipe.weight_formats(), scale_format=scale_format)
        packed = PackedWeight.of(quantizer, quantizer.encode(rows), weight.shape)
        make_packed(self.modules[param_name.rpartition(".")[0]], [weight.shape[1]], [packed], [])

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            _check_scales(self.modules)
        else:
            self.quantization_config.layers = {name: m.describe() for name, m in packed_layers(model).items()}
        self.modules = {}  # the model has this quantizer: each would keep the other until garbage is collected
        model.register_to_config(quantization_config=self.quantization_config)
        refuse_template(model)
        model._register_state_dict_hook(know_weights)
        self.opened, self.model = frozenset(model.state_dict()), weakref.ref(model)
        model.is_quantized = False  # or diffusers refuses to cast it, which codes and scales take no harm from
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        for layer in packed_layers(model).values():
            kept = layer.type_of_weight if layer.bias is None else layer.bias  # in float32 some are in any model
            make_plain(layer, kept.dtype)
        for attention in quantized_attention(model).values():
            make_attention_plain(attention)
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


def _check_scales(modules: Mapping[str, nn.Module]) -> None:
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


def _check_tensors(modules: Mapping[str, nn.Module], found: Mapping[str, StoredTensor]) -> None:
    """Compares what files hold with what the modules of a model need.

    Raises:
        ValueError: if a tensor is missing, or one of a packed layer is too much or of another type or shape.
    """
    expected = {
        f"{name}.{key}".lstrip("."): (module, value)
        for name, module in modules.items()
        for key, value in (module._parameters | module._buffers).items()
        if value is not None and key not in module._non_persistent_buffers_set
    }
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"the files lack {missing[0]}" + f" and {len(missing) - 1} more" * (len(missing) > 1))

    def packed(name: str) -> bool:
        """Whether a tensor belongs to a packed layer."""
        while name:
            name = name.rpartition(".")[0]
            if isinstance(modules.get(name), PackedLayer):
                return True
        return False

    if extra := sorted(tensor for tensor in found.keys() - expected.keys() if packed(tensor)):
        raise ValueError(f"the files hold {extra[0]}, which quantization_config does not know of")
    for tensor, (module, value) in expected.items():
        exact = isinstance(module, ExactBuffers)
        if exact or isinstance(module, PackedLayer):
            wanted = StoredTensor(_STORED_TYPES.get(value.dtype, ""), tuple(value.shape))
            if found[tensor].shape != wanted.shape or (exact and found[tensor].dtype != wanted.dtype):
                raise ValueError(f"{tensor} is {found[tensor]} in the files, but should be {wanted}")


AUTO_QUANTIZER_MAPPING[QuantizationMethod.FPQ.value] = FPQQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[QuantizationMethod.FPQ.value] = FPQConfig
