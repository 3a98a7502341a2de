"""``fpq inspect``: what the layers of a packed pipeline hold, and on which path each runs."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fpq_lightning.diffusion.pipelines import denoiser_name, load_pipeline
from fpq_lightning.diffusion.sampling import SamplerConfig, sample, using_sampler
from fpq_lightning.nn.backends.hardware import Hardware
from fpq_lightning.nn.backends.paths import PATHS, choose
from fpq_lightning.nn.calibrated import input_of
from fpq_lightning.nn.coverage import Coverage
from fpq_lightning.nn.packed_layer import PackedLayer, packed_layers
from fpq_lightning.storage.pipeline import is_quantized, load_quantized, read_description


@dataclass(frozen=True)
class LayerSummary:
    """A packed layer.

    Attributes:
        name: of the module.
        shape: `[out, in, ...]` of its weight.
        weights: formats of the parts of the weight.
        inputs: formats of the parts of the input.
        bytes: of everything the layer holds.
        path: the arithmetic path of its products in the call that was looked at.
        operations: floating-point operations of its products in that call.
    """

    name: str
    shape: tuple[int, ...]
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    bytes: int
    path: str
    operations: float


class _CalledError(Exception):
    """The denoiser was called."""


def _first_call(pipeline: DiffusionPipeline, denoiser: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a pipeline calls its denoiser with, for one image."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _CalledError

    handle = denoiser.register_forward_pre_hook(stop, with_kwargs=True)
    prompts = ["an image"] if "prompt" in inspect.signature(pipeline.__call__).parameters else None
    sampler = SamplerConfig(scheduler=None, steps=2)
    try:
        with using_sampler(pipeline, sampler):
            sample(pipeline, sampler, [0], prompts)
    except _CalledError:
        pass
    except TypeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{type(pipeline).__name__} cannot be called to be inspected: {reason}") from error
    finally:
        handle.remove()
    if not calls:
        raise ValueError(f"{type(pipeline).__name__} does not call its denoiser: its layers cannot be inspected")
    return calls[0]


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {key: _to_meta(v) for key, v in value.items()}
    return type(value)(map(_to_meta, value)) if isinstance(value, (list, tuple)) else value


@torch.no_grad()
def inspect_pipeline(directory: str | Path, hardware: Hardware, dtype: torch.dtype) -> list[LayerSummary]:
    """Looks at the layers of a packed pipeline during one call of its denoiser, which computes nothing.

    Args:
        directory: of the pipeline.
        hardware: where it is to run.
        dtype: of activations there.

    Raises:
        FileNotFoundError: if there is no pipeline.
        ValueError: if no layer of its denoiser is packed, or a file is damaged.
    """
    quantized = is_quantized(directory)
    pipeline = load_quantized(directory) if quantized else load_pipeline(directory)
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    layers = packed_layers(denoiser)
    if not layers:
        how = "write them with fpq export DIR --format fpq" if quantized else "quantize it with fpq fit"
        raise ValueError(f"{directory} holds no packed layers: {how}")
    size = {
        name: sum(t.numel() * t.element_size() for t in layer.state_dict().values()) for name, layer in layers.items()
    }
    args, kwargs = _first_call(pipeline, denoiser)
    denoiser.to("meta")
    elements: Counter[str] = Counter()
    operations: Counter[str] = Counter()

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            layer = cast(PackedLayer, module)
            elements[name] = max(elements[name], input_of(args, kwargs).numel())
            positions = output.numel() // layer.shape[0]
            operations[name] += 2 * positions * int(torch.Size(layer.shape).numel())

        return hook

    handles = [layer.register_forward_hook(look(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        denoiser(*_to_meta(args), **_to_meta(kwargs))
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{type(denoiser).__name__} cannot run without data, to be inspected: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, layer in layers.items():
        plan = choose(layer.paths, hardware, dtype, layer.arithmetic)
        found.append(
            LayerSummary(
                name,
                layer.shape,
                tuple(w.format.name for w in layer.weights),
                tuple(q.format.name for q in layer.inputs),
                size[name],
                next(path for path in plan if PATHS[path].takes_rows(elements[name], layer.shape[1])),
                operations[name],
            )
        )
    return found


def low_bit_share(layers: Sequence[LayerSummary]) -> float:
    """The share of the operations of packed layers that run on low-bit paths."""
    total = sum(layer.operations for layer in layers)
    return sum(layer.operations for layer in layers if PATHS[layer.path].low_bit) / total if total else 0.0


def render(layers: Sequence[LayerSummary]) -> str:
    """A table of the layers, and what they come to."""
    total = sum(layer.operations for layer in layers) or 1
    lines = [("layer", "weight", "formats", "input", "bytes", "path", "operations")]
    for layer in layers:
        shape = "x".join(map(str, layer.shape))
        formats, inputs = ("+".join(names) or "-" for names in (layer.weights, layer.inputs))
        lines.append(
            (layer.name, shape, formats, inputs, f"{layer.bytes:,}", layer.path, f"{layer.operations / total:.2%}")
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    weights = sum(int(torch.Size(layer.shape).numel()) for layer in layers)
    held = sum(layer.bytes for layer in layers)
    table.append(
        f"{len(layers)} layers, {held:,} bytes ({held / weights / 2:.3f} of half precision); "
        f"{low_bit_share(layers):.1%} of their operations on low-bit paths"
    )
    return "\n".join(table)


def coverage_lines(directory: str | Path) -> list[str]:
    """How much of a quantized pipeline's denoiser is quantized, and what is not; empty if its files do not say."""
    found = read_description(directory).get("coverage")
    return Coverage.from_dict(found).lines() if found else []
