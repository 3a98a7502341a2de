"""Statistics of a quantized network: bits and zeros of its weights, ranges of its activations."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.nn.calibrated import LayerQuantization, QuantizedLayer, input_of, quantized_layers, running
from fpq_lightning.nn.coverage import coverage
from fpq_lightning.quantization.quantizer import Quantizer

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
        parts = list(quantization.weights)
        codes = quantization.codes or [q.encode(r) for q, r in zip(parts, layer.weight_rows(), strict=True)]
        n = sum(c.numel() for c in codes)
        bits = sum(q.scale_bits + c.numel() * q.format.bits for q, c in zip(parts, codes, strict=True))
        zeros = sum(map(_zeros, parts, codes))
        found.append({"name": name, "parameters": n, "bits": bits / n, "zeros": zeros / n})
    return found


def _zeros(quantizer: Quantizer, codes: Tensor) -> int:
    """How many codes stand for zero."""
    if quantizer.offset is not None:
        return int((quantizer.decode(codes) == 0).sum())
    counts = torch.bincount(codes.flatten(), minlength=len(quantizer.format.values)).cpu()
    return int(counts[quantizer.format.values == 0].sum())


def weight_statistics(module: nn.Module, layers: list[dict[str, Any]] | None = None) -> dict[str, float | None]:
    """Statistics of all quantized weights.

    Args:
        module: the network.
        layers: the result of `layer_statistics`, if it is known already.

    Returns:
        ``weight_bits``, bits a weight with scales; ``sparsity``, the share of exact zeros (both None without quantized
        weights); and ``quantized_share``, the share of all parameters that are quantized, as `coverage` counts them.
    """
    layers = layer_statistics(module) if layers is None else layers
    total = sum(layer["parameters"] for layer in layers)
    share = coverage(module, {layer["name"] for layer in layers}).share

    def mean(key: str) -> float | None:
        return sum(layer[key] * layer["parameters"] for layer in layers) / total if total else None

    return {"weight_bits": mean("bits"), "sparsity": mean("zeros"), "quantized_share": share}


@torch.no_grad()
def activation_ranges(
    module: nn.Module, calibration: CalibrationSet, batch_size: int, device: torch.device, n: int = 64
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
        (None if they are dynamic) and ``largest``, the largest magnitude in each bin (None for an empty bin, or one
        with Inf). Empty if the network has no finite timestep among its inputs. A layer that does not read
        something of each sample is left out, with a warning.
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
    parts: dict[str, list[Tensor | None]] = {name: [] for name in layers}
    order = list(calibration.chunks(rows, batch_size))
    for chunk in order:
        for name, largest in _largest(module, layers, calibration.batch(chunk, device), len(chunk)).items():
            parts[name].append(largest)
    # Some models have a timestep for each token or frame, of which some are clean: the noisiest tells the step.
    values = calibration.inputs[key]  # a tensor, or a list where their shapes differ
    timesteps = torch.stack([torch.as_tensor(values[i]).float().amax() for i in torch.cat(order).tolist()])
    if not timesteps.isfinite().all():
        return {}
    edges = torch.linspace(timesteps.min().item(), timesteps.max().item() + 1, _TIMESTEP_BINS + 1)
    bins = torch.bucketize(timesteps, edges, right=True) - 1
    found, left = [], []
    for name, batches in parts.items():
        known = [largest for largest in batches if largest is not None]
        if len(known) < len(batches):
            left.append(name)
        else:
            found.append({"name": name, "clip": _clip(layers[name]), "largest": _by_bin(torch.cat(known), bins)})
    if left:
        names = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        warnings.warn(f"activation ranges leave out layers that do not read each sample: {names}", stacklevel=4)
    return {"timesteps": edges.tolist(), "layers": found}


def _largest(
    module: nn.Module, layers: Mapping[str, QuantizedLayer], inputs: Mapping[str, Any], n: int
) -> dict[str, Tensor | None]:
    """The largest magnitude of what each layer reads of each of n samples, over its calls; None if that is not told."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    with ExitStack() as stack:
        for name, layer in layers.items():

            def keep(layer: Any, args: tuple, kwargs: dict[str, Any], name: str = name) -> None:
                x = layer.batched(input_of(args, kwargs)).detach()
                each = x.abs().flatten(1).amax(1) if x.numel() else x.new_zeros(0)
                seen[name].append(each.float().cpu())

            stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        stack.enter_context(running(module, "full_precision"))
        module(**inputs)
    return {name: _of_samples(calls, n) for name, calls in seen.items()}


def _of_samples(calls: list[Tensor], n: int) -> Tensor | None:
    """Values of the rows of each call, by sample; a sample may have several rows."""
    if not calls or any(not len(rows) or len(rows) % n for rows in calls):
        return None
    return torch.stack([rows.reshape(n, -1).amax(1) for rows in calls]).amax(0)


def _by_bin(largest: Tensor, bins: Tensor) -> list[float | None]:
    found = [largest[bins == i].amax() if (bins == i).any() else None for i in range(_TIMESTEP_BINS)]
    return [value.item() if value is not None and value.isfinite() else None for value in found]


def _clip(layer: QuantizedLayer) -> float | None:
    """The largest magnitude that the layer's input quantizers can represent."""
    quantization = _quantization(layer)
    quantizers = [] if quantization is None else quantization.inputs
    clips = [q.clip.abs().amax().item() for q in quantizers if q.scale is not None]
    return max(clips) if clips and len(clips) == len(quantizers) else None
