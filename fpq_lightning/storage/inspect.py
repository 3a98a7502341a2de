"""``fpq inspect``: what the layers of a packed pipeline hold, and on which path each runs."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fpq_lightning.diffusion.denoisers import find_denoisers, quantized_denoisers
from fpq_lightning.diffusion.pipelines import load_pipeline
from fpq_lightning.diffusion.sampling import SamplerConfig, generate, shortened, using_sampler
from fpq_lightning.nn.backends.hardware import Hardware
from fpq_lightning.nn.backends.paths import PATHS, choose
from fpq_lightning.nn.calibrated import input_of
from fpq_lightning.nn.coverage import Coverage
from fpq_lightning.nn.packed_layer import PackedLayer, packed_layers
from fpq_lightning.storage.pipeline import is_quantized, load_quantized, read_descriptions


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
    """All denoisers were called."""


@dataclass
class _Seen:
    """What the layers of a denoiser do in its first call.

    Attributes:
        elements: of the input of each layer, by name.
        operations: of its products.
    """

    elements: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)

    def look(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """A forward hook of a packed layer."""
        shape = cast(PackedLayer, layer).shape
        self.elements[name] = max(self.elements[name], input_of(args, kwargs).numel())
        positions = output.numel() // shape[0]
        self.operations[name] += 2 * positions * int(torch.Size(shape).numel())


def _first_calls(pipeline: DiffusionPipeline, denoisers: Mapping[str, nn.Module]) -> dict[str, _Seen]:
    """Calls a pipeline for one image, with denoisers that compute nothing, until each of them was called."""
    seen: dict[str, _Seen] = {}

    def stand_in(name: str, *args: Any, **kwargs: Any) -> Any:
        denoiser, found = denoisers[name], _Seen()
        with ExitStack() as stack, _without_data(denoiser):
            for layer_name, layer in packed_layers(denoiser).items():
                hook = partial(found.look, layer_name)
                stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
            try:
                output = type(denoiser).forward(denoiser, *_on("meta", args), **_on("meta", kwargs))
            except (RuntimeError, TypeError) as error:
                kind, reason = type(denoiser).__name__, " ".join(str(error).split())[:200]
                raise ValueError(f"{kind} cannot run without data, to be inspected: {reason}") from error
        seen.setdefault(name, found)
        if len(seen) == len(denoisers):
            raise _CalledError
        return tree_map(lambda x: torch.zeros_like(x, device="cpu") if isinstance(x, Tensor) else x, output)

    with ExitStack() as stack:
        for name, denoiser in denoisers.items():
            denoiser.forward = partial(stand_in, name)  # hides that of the class
            stack.callback(delattr, denoiser, "forward")
        own = SamplerConfig(scheduler=None)
        for sampler in (shortened(pipeline, own), own):  # a denoiser may be called late
            with suppress(_CalledError):
                _call(pipeline, sampler)
            if len(seen) == len(denoisers):
                return seen
    never = ", ".join(name for name in denoisers if name not in seen)
    raise ValueError(f"{type(pipeline).__name__} does not call its {never}: its layers cannot be inspected")


def _call(pipeline: DiffusionPipeline, sampler: SamplerConfig) -> None:
    prompts = ["an image"] if "prompt" in inspect.signature(pipeline.__call__).parameters else None
    try:
        with using_sampler(pipeline, sampler):
            generate(pipeline, sampler, [0], prompts)
    except TypeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{type(pipeline).__name__} cannot be called to be inspected: {reason}") from error


@contextmanager
def _without_data(model: nn.Module) -> Iterator[None]:
    """Within the block the tensors of a model have shapes alone."""
    held = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    model.to("meta")
    try:
        yield
    finally:
        for module, parameters, buffers in held:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _on(device: str, value: Any) -> Any:
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, value)


@torch.no_grad()
def inspect_pipeline(directory: str | Path, hardware: Hardware, dtype: torch.dtype) -> list[LayerSummary]:
    """Looks at the layers of a packed pipeline during one call of each denoiser, which computes nothing.

    Args:
        directory: of the pipeline.
        hardware: where it is to run.
        dtype: of activations there.

    Raises:
        FileNotFoundError: if there is no pipeline.
        ValueError: if no layer of its denoisers is packed, or a file is damaged.
    """
    quantized = is_quantized(directory)
    pipeline = load_quantized(directory, verify=True) if quantized else load_pipeline(directory)
    denoisers = {name: one for name, one in quantized_denoisers(pipeline).items() if packed_layers(one)}
    if not denoisers:
        how = "write them with fpq export DIR --format fpq" if quantized else "quantize it with fpq fit"
        raise ValueError(f"{directory} holds no packed layers: {how}")
    seen = _first_calls(pipeline, {**find_denoisers(pipeline), **denoisers})
    found = []
    for component, denoiser in denoisers.items():
        prefix, call = f"{component}." if len(denoisers) > 1 else "", seen[component]
        for name, layer in packed_layers(denoiser).items():
            plan = choose(layer.paths, hardware, dtype, layer.arithmetic)
            found.append(
                LayerSummary(
                    prefix + name,
                    layer.shape,
                    tuple(w.format.name for w in layer.weights),
                    tuple(q.format.name for q in layer.inputs),
                    sum(t.numel() * t.element_size() for t in layer.state_dict().values()),
                    next(path for path in plan if PATHS[path].takes_rows(call.elements[name], layer.shape[1])),
                    call.operations[name],
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
    """How much of each denoiser of a quantized pipeline is quantized, and what is not, as far as its files say."""
    found = read_descriptions(directory)
    return [
        f"{name}: {line}" if len(found) > 1 else line
        for name, description in found.items()
        for line in _coverage_lines(description)
    ]


def _coverage_lines(description: Mapping[str, Any]) -> list[str]:
    lines = Coverage.from_dict(description["coverage"]).lines() if description.get("coverage") else []
    if attention := description.get("attention"):
        formats = Counter(quantizer["format"] for operands in attention.values() for quantizer in operands)
        used = ", ".join(f"{name} x{n}" for name, n in formats.most_common())
        lines.append(f"attention of {len(attention)} module{'s' * (len(attention) > 1)} is quantized ({used})")
    return lines
