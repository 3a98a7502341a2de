"""FP8 in the key layout of NVIDIA ModelOpt.

``LAYER.weight`` holds codes, ``weight_scale`` the factors that they are multiplied by, and ``input_scale`` that of the
quantized input. SGLang's diffusion models and vLLM read it (``quant_method: modelopt``).
"""

from __future__ import annotations

from typing import Any

from fpq_lightning.nn.packed_layer import PackedLayer
from fpq_lightning.storage.exports.layout import Layout, Tensors, register_layouts, whole_linear_weight


def modelopt_config(algorithm: str, quantizers: dict[str, Any], ignored: list[str], version: str) -> dict[str, Any]:
    """The ``quantization_config`` of ModelOpt.

    Args:
        algorithm: its ``quant_algo``.
        quantizers: of ``weights`` and ``input_activations``.
        ignored: names of the layers in full precision.
        version: of this package.
    """
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "config_groups": {"group_0": {"targets": ["Linear"], **quantizers}},
        "ignore": ignored,
        "producer": {"name": "fpq_lightning", "version": version},
    }


def float_type(bits: int, **options: Any) -> dict[str, Any]:
    """A floating-point quantizer in the terms of ModelOpt."""
    return {"num_bits": bits, "type": "float", "dynamic": False, **options}


def _tensors(layer: PackedLayer) -> Tensors | None:
    weight = whole_linear_weight(layer)
    if weight is None or weight.format.name != "float8_e4m3fn" or weight.scale.numel() != 1 or not len(layer.inputs):
        return None
    source = layer.inputs[0]
    if source.format.name != "float8_e4m3fn" or source.scale is None or source.offset is not None:
        return None
    return {"weight": weight.codes, "weight_scale": weight.scale.reshape(()), "input_scale": source.scale.reshape(())}


def _channel_tensors(layer: PackedLayer) -> Tensors | None:
    weight = whole_linear_weight(layer)
    if weight is None or weight.format.name != "float8_e4m3fn" or weight.scale.shape != (weight.shape[0], 1):
        return None
    return {"weight": weight.codes, "weight_scale": weight.scale.reshape(-1)}


def _config(ignored: list[str], version: str) -> dict[str, Any]:
    return modelopt_config("FP8", {"weights": float_type(8), "input_activations": float_type(8)}, ignored, version)


def _channel_config(ignored: list[str], version: str) -> dict[str, Any]:
    inputs = {**float_type(8, strategy="token"), "dynamic": True}
    quantizers = {"weights": float_type(8, strategy="channel"), "input_activations": inputs}
    return modelopt_config("FP8_PER_CHANNEL_PER_TOKEN", quantizers, ignored, version)


register_layouts(
    "modelopt",
    "FP8, for NVIDIA ModelOpt",
    "NVIDIA ModelOpt (FP8)",
    Layout(
        takes="Linear layers in float8_e4m3fn with one scale and static float8_e4m3fn inputs",
        recipe="--config fp8_fp8_hardware --recipe.weights.granularity tensor",
        tensors=_tensors,
        config=_config,
    ),
    Layout(
        takes="Linear layers in float8_e4m3fn with one scale for each output channel",
        recipe="--config fp8_fp8_hardware",
        tensors=_channel_tensors,
        config=_channel_config,
    ),
)
