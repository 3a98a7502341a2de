"""Statistics of a quantized network: bits and zeros of its weights, ranges of its activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.nn.calibrated import LayerQuantization, QuantizedLayer, input_of, quantized_layers, running

_TIMESTEP_BINS = 10
_TIMESTEPS = ("timestep", "timesteps")  # names of the denoisers' argument


def _quantization(layer: QuantizedLayer) -> LayerQuantization | None:
    found = dict(layer.variants.items()).get("quantized")
    return found if isinstance(found, LayerQuantization) else None


@torch.no_grad()
def layer_statistics(module: nn.Module) -> list[dict[str, Any]]:
    """Name, parameters, bits a weight (codes and scales) and share of zeros of every layer with a quantized weight."""
    found = []
    for name, layer in quantized_layers(module).items():
        quantization = _quantization(layer)
        if quantization is None or not quantization.weights:
            continue
        weight, bits = layer.quantized_weight(quantization), 0
        for quantizer, rows in zip(quantization.weights, layer.weight_rows(), strict=True):
            bits += rows.numel() * quantizer.format.bits + quantizer.scale_bits
        found.append(
            {
                "name": name,
                "parameters": weight.numel(),
                "bits": bits / weight.numel(),
                "zeros": (weight == 0).sum().item() / weight.numel(),
            }
        )
    return found


def weight_statistics(module: nn.Module, layers: list[dict[str, Any]] | None = None) -> dict[str, float | None]:
    """Statistics of all quantized weights.

    Args:
        module: the network.
        layers: the result of `layer_statistics`, if it is known already.

    Returns:
        ``weight_bits``, bits a weight with scales; ``sparsity``, the share of exact zeros (both None without quantized
        weights); and ``quantized_share``, the share of all weights that are quantized.
    """
    layers = layer_statistics(module) if layers is None else layers
    total = sum(layer["parameters"] for layer in layers)
    every = sum(
        p.numel() for name, p in module.named_parameters() if name.endswith("weight") and ".variants." not in name
    )

    def mean(key: str) -> float | None:
        return sum(layer[key] * layer["parameters"] for layer in layers) / total if total else None

    return {"weight_bits": mean("bits"), "sparsity": mean("zeros"), "quantized_share": total / every}


@torch.no_grad()
def activation_ranges(
    module: nn.Module, calibration: CalibrationSet, batch_size: int, device: torch.device, n: int = 256
) -> dict[str, Any]:
    """Largest magnitudes of the layers' inputs along the trajectory, in full precision.

    Args:
        module: the network.
        calibration: inputs of the network.
        batch_size: samples in a pass; halved as long as memory runs out.
        device: device of the network.
        n: number of samples, spread over the set.

    Returns:
        ``timesteps``, the edges of ten bins; and ``layers``, each with its ``name``, the ``clip`` of its quantizers
        (None if they are dynamic) and ``largest``, the largest magnitude in each bin (None for an empty bin). Empty
        if the network has no timestep among its inputs.
    """
    while True:
        try:
            return _activation_ranges(module, calibration, batch_size, device, n)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        batch_size = -(-batch_size // 2)


def _activation_ranges(
    module: nn.Module, calibration: CalibrationSet, batch_size: int, device: torch.device, n: int
) -> dict[str, Any]:
    key = next((name for name in _TIMESTEPS if name in calibration.inputs), None)
    layers = {name: layer for name, layer in quantized_layers(module).items() if _quantization(layer) is not None}
    if key is None or not layers:
        return {}
    rows = torch.linspace(0, len(calibration) - 1, min(n, len(calibration))).long()
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen[name].append(
                input_of(args, kwargs).detach().abs().flatten(1).amax(1).float().cpu()
            ),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    try:
        with running(module, "full_precision"):
            for chunk in rows.split(batch_size):
                module(**calibration.batch(chunk, device))
    finally:
        for handle in handles:
            handle.remove()
    timesteps = calibration.inputs[key][rows].flatten().float()
    edges = torch.linspace(timesteps.min().item(), timesteps.max().item() + 1, _TIMESTEP_BINS + 1)
    bins = torch.bucketize(timesteps, edges, right=True) - 1
    found = []
    for name, parts in seen.items():
        values = torch.cat(parts) if parts else torch.empty(0)
        if not len(values) or len(values) % len(rows):
            continue  # the layer did not run, or its leading dimension is no multiple of the samples
        largest = values.reshape(len(rows), -1).amax(1)
        found.append({"name": name, "clip": _clip(layers[name]), "largest": _by_bin(largest, bins)})
    return {"timesteps": edges.tolist(), "layers": found}


def _by_bin(largest: Tensor, bins: Tensor) -> list[float | None]:
    return [largest[bins == i].amax().item() if (bins == i).any() else None for i in range(_TIMESTEP_BINS)]


def _clip(layer: QuantizedLayer) -> float | None:
    """The largest magnitude that the layer's input quantizers can represent."""
    quantization = _quantization(layer)
    quantizers = [] if quantization is None else quantization.inputs
    clips = [q.clip.abs().amax().item() for q in quantizers if q.scale is not None]
    return max(clips) if clips and len(clips) == len(quantizers) else None
