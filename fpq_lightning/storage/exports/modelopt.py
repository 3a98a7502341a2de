"""The key layouts of NVIDIA ModelOpt: FP8 and NVFP4.

``LAYER.weight`` holds codes, ``weight_scale`` (and ``weight_scale_2``) factors that they are multiplied by, and
``input_scale`` that of the quantized input. Read by SGLang's diffusion models and by vLLM (``quant_method: modelopt``);
diffusers reads the same tensors in single files of Black Forest Labs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpq_lightning.nn.packed import BlockScaledWeight, PackedLayer
from fpq_lightning.storage.exports.layout import Layout, Tensors, whole_linear_weight

E2M1 = ("e2m1", "float4_e2m1fn")
"""Names of formats whose codes are those of FP4 tensor cores."""

_NVFP4_TOP = 6.0 * 448.0  # of a value times a block scale


def _config(algorithm: str, quantizers: dict[str, Any], ignored: list[str], version: str) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "config_groups": {"group_0": {"targets": ["Linear"], **quantizers}},
        "ignore": ignored,
        "producer": {"name": "fpq_lightning", "version": version},
    }


def _fp8_tensors(layer: PackedLayer) -> Tensors | None:
    weight = whole_linear_weight(layer)
    if weight is None or weight.format.name != "float8_e4m3fn" or weight.scale.numel() != 1 or not len(layer.inputs):
        return None
    source = layer.inputs[0]
    if source.format.name != "float8_e4m3fn" or source.scale is None or source.offset is not None:
        return None
    return {"weight": weight.codes, "weight_scale": weight.scale.reshape(()), "input_scale": source.scale.reshape(())}


def _fp8_channel_tensors(layer: PackedLayer) -> Tensors | None:
    weight = whole_linear_weight(layer)
    if weight is None or weight.format.name != "float8_e4m3fn" or weight.scale.shape != (weight.shape[0], 1):
        return None
    return {"weight": weight.codes, "weight_scale": weight.scale.reshape(-1)}


def _nvfp4_tensors(layer: PackedLayer) -> Tensors | None:
    weight = whole_linear_weight(layer)
    if not isinstance(weight, BlockScaledWeight) or weight.format.name not in E2M1:
        return None
    if weight.tensor_scale is None or weight.shape[1] != 16 * weight.block_scale.shape[1]:
        return None
    return {
        "weight": weight.codes,
        "weight_scale": weight.block_scale,
        "weight_scale_2": weight.tensor_scale,
        "input_scale": _nvfp4_input_scale(layer),
    }


def _nvfp4_input_scale(layer: PackedLayer) -> Tensor:
    """The scale of an NVFP4 input whose largest magnitude is the clip of the layer's input quantizer.

    1, as readers take it where there is none, if the quantizer has no clip: block scales reach from 2^-9 to 448 then.
    """
    if not len(layer.inputs) or layer.inputs[0].scale is None:
        return torch.ones(())
    source = layer.inputs[0]
    largest = source.clip.abs() if source.offset is None else torch.maximum(source.clip.abs(), source.offset.abs())
    return largest.reshape(()) / _NVFP4_TOP


def share_tensor_scales(tensors: dict[str, Tensors]) -> None:
    """Gives the layers of one module, such as query, key and value, one ``weight_scale_2``.

    Readers that fuse them take the largest. Ours are powers of two, so block scales take up the difference, exactly;
    where one would become too small for E4M3, that module's layers stay as they are.

    Args:
        tensors: of layers by name, changed in place.
    """
    families: dict[str, list[Tensors]] = {}
    for name, own in tensors.items():
        families.setdefault(name.rpartition(".")[0], []).append(own)
    for family in families.values():
        largest = torch.stack([own["weight_scale_2"] for own in family]).amax()
        wanted = [own["weight_scale"].float() * (own["weight_scale_2"] / largest) for own in family]
        scales = [scale.to(torch.float8_e4m3fn) for scale in wanted]
        if all(torch.equal(scale.float(), exact) for scale, exact in zip(scales, wanted, strict=True)):
            for own, scale in zip(family, scales, strict=True):
                own.update(weight_scale=scale, weight_scale_2=largest.clone())


def _float(bits: int, **options: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "dynamic": False, **options}


FP8 = Layout(
    takes="Linear layers in float8_e4m3fn with one scale and static float8_e4m3fn inputs",
    recipe="--config fp8_fp8_hardware --recipe.weights.granularity tensor",
    tensors=_fp8_tensors,
    config=lambda ignored, version: _config(
        "FP8", {"weights": _float(8), "input_activations": _float(8)}, ignored, version
    ),
)
FP8_PER_CHANNEL = Layout(
    takes="Linear layers in float8_e4m3fn with one scale for each output channel",
    recipe="--config fp8_fp8_hardware",
    tensors=_fp8_channel_tensors,
    config=lambda ignored, version: _config(
        "FP8_PER_CHANNEL_PER_TOKEN",
        {
            "weights": _float(8, strategy="channel"),
            "input_activations": {**_float(8, strategy="token"), "dynamic": True},
        },
        ignored,
        version,
    ),
)
NVFP4 = Layout(
    takes="Linear layers in float4_e2m1fn with float8_e4m3fn scales for groups of 16",
    recipe="--config nvfp4",
    tensors=_nvfp4_tensors,
    config=lambda ignored, version: {
        **_config(
            "NVFP4",
            {"weights": _float(4, group_size=16), "input_activations": _float(4, group_size=16)},
            ignored,
            version,
        ),
        "group_size": 16,
    },
    settle=share_tensor_scales,
)
