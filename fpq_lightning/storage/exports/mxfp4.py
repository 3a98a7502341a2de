"""MXFP4 in the layout ``mxfp4-pack-quantized`` of compressed-tensors, which vLLM reads.

``LAYER.weight_packed`` holds two E2M1 codes a byte, the first in the low half, and ``LAYER.weight_scale`` the biased
exponent of each group of 32. Inputs are not quantized (MXFP4A16), since no reader knows static scales of inputs.
"""

from __future__ import annotations

from typing import Any

from fpq_lightning.nn.packed_layer import PackedLayer
from fpq_lightning.storage.exports.layout import Layout, Tensors, fp4_blocks, register_layouts

_FORMAT = "mxfp4-pack-quantized"


def _tensors(layer: PackedLayer) -> Tensors | None:
    weight = fp4_blocks(layer, 32, "float8_e8m0fnu")
    return None if weight is None else {"weight_packed": weight.codes, "weight_scale": weight.block_scale}


def _config(ignored: list[str], version: str) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": _FORMAT}
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
    }


register_layouts(
    "mxfp4",
    "FP4 in blocks of 32, for compressed-tensors",
    "compressed-tensors (mxfp4-pack-quantized)",
    Layout(
        takes="Linear layers in float4_e2m1fn with float8_e8m0fnu scales for groups of 32",
        recipe="--config mxfp4",
        tensors=_tensors,
        config=_config,
    ),
)
