"""NVFP4 in the key layout of NVIDIA ModelOpt: FP4 in blocks of 16.

``LAYER.weight`` holds two E2M1 codes a byte, ``weight_scale`` and ``weight_scale_2`` the scales of blocks and of the
tensor, and ``input_scale`` that of the quantized input. SGLang's diffusion models and vLLM read it (``quant_method:
modelopt``); diffusers reads the same tensors in single files of Black Forest Labs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpq_lightning.nn.packed_layer import PackedLayer
from fpq_lightning.storage.exports.layout import Layout, Tensors, fp4_blocks, register_layouts
from fpq_lightning.storage.exports.modelopt import float_type, modelopt_config

_TOP = 6.0 * 448.0  # of a value times a block scale


def _tensors(layer: PackedLayer) -> Tensors | None:
    weight = fp4_blocks(layer, 16, "float8_e4m3fn")
    if weight is None or weight.tensor_scale is None:
        return None
    return {
        "weight": weight.codes,
        "weight_scale": weight.block_scale,
        "weight_scale_2": weight.tensor_scale,
        "input_scale": _input_scale(layer),
    }


def _input_scale(layer: PackedLayer) -> Tensor:
    """The scale of an NVFP4 input whose largest magnitude is the clip of the layer's input quantizer.

    Without a clip it is 1, the default of readers: block scales then reach from 2^-9 to 448.
    """
    if not len(layer.inputs) or layer.inputs[0].scale is None:
        return torch.ones(())
    source = layer.inputs[0]
    largest = source.clip.abs() if source.offset is None else torch.maximum(source.clip.abs(), source.offset.abs())
    return largest.reshape(()) / _TOP


def share_tensor_scales(tensors: dict[str, Tensors]) -> None:
    """Gives the layers of one module, such as query, key and value, one ``weight_scale_2``.

    Readers that fuse them take the largest. Ours are powers of two, so the block scales can take up the difference
    exactly. Where one would become too small for E4M3, the layers of that module stay as they are.

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


def _config(ignored: list[str], version: str) -> dict[str, Any]:
    blocks = float_type(4, group_size=16)
    config = modelopt_config("NVFP4", {"weights": blocks, "input_activations": blocks}, ignored, version)
    return {**config, "group_size": 16}


register_layouts(
    "nvfp4",
    "FP4 in blocks of 16, for NVIDIA ModelOpt",
    "NVIDIA ModelOpt (NVFP4)",
    Layout(
        takes="Linear layers in float4_e2m1fn with float8_e4m3fn scales for groups of 16",
        recipe="--config nvfp4",
        tensors=_tensors,
        config=_config,
        settle=share_tensor_scales,
    ),
)
