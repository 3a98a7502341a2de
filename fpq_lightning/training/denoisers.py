"""The denoisers of a pipeline as a calibration sees them: one after the other, each with its units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import cast

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fpq_lightning.diffusion.denoisers import find_denoisers
from fpq_lightning.graph.units import Unit, discover_units, select_layers
from fpq_lightning.nn.calibrated import is_quantizable
from fpq_lightning.nn.coverage import Coverage
from fpq_lightning.quantization.quantizer import layers_without_groups
from fpq_lightning.quantization.recipe import Recipe


@dataclass
class Denoiser:
    """A network of a pipeline that is quantized.

    Attributes:
        name: of the component.
        network: it.
        recipe: what to quantize it to; its patterns are those that match names of this network.
        candidates: its units, as the module tree gives them.
        prefix: of names in reports and checkpoints: the component where several are quantized, otherwise empty.
        units: in execution order, once they are traced.
        start: the position of the first of them in the calibration.
        coverage: how much of it is going to be quantized.
    """

    name: str
    network: nn.Module
    recipe: Recipe
    candidates: list[Unit]
    prefix: str = ""
    units: list[Unit] = field(default_factory=list)
    start: int = 0
    coverage: Coverage = field(default_factory=lambda: Coverage(0, 0, []))

    def full(self, name: str) -> str:
        """The name of a unit or layer in reports and checkpoints."""
        return f"{self.prefix}{name}"


def make_denoisers(pipeline: DiffusionPipeline, recipe: Recipe) -> list[Denoiser]:
    """Finds the denoisers that a recipe asks for, and in them what cannot be quantized.

    Raises:
        ValueError: if a denoiser, a layer or a pattern of the recipe does not fit.
    """
    networks = find_denoisers(pipeline, cast("list[str] | None", recipe.denoisers))
    names = {name: _layer_names(network) for name, network in networks.items()}
    for pattern in [*recipe.include, *recipe.exclude, *recipe.activations.token_layers] if len(networks) > 1 else ():
        if not any(_own([pattern], name, layers) for name, layers in names.items()):
            raise ValueError(f"pattern {pattern!r} matches no layer of {', '.join(networks)}")
    found = []
    for name, network in networks.items():
        network.eval().requires_grad_(False)
        own = _recipe_of(recipe, name, names[name]) if len(networks) > 1 else recipe
        units = discover_units(network, own.include, own.exclude, own.units == "layer")
        _check_layers(network, units, own, f"{name}." if len(networks) > 1 else "")
        found.append(Denoiser(name, network, own, units))
    return found


def _layer_names(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if is_quantizable(module)]


def _recipe_of(recipe: Recipe, name: str, layers: Sequence[str]) -> Recipe:
    """The recipe with those of its patterns that match layers of one of several denoisers."""
    include = _own(recipe.include, name, layers)
    if not include:
        raise ValueError(f"recipe.include {recipe.include} leaves no layer of {name}: leave it out of recipe.denoisers")
    token_layers = _own(recipe.activations.token_layers, name, layers)
    activations = replace(recipe.activations, token_layers=token_layers)
    return replace(recipe, include=include, exclude=_own(recipe.exclude, name, layers), activations=activations)


def _own(patterns: Sequence[str], name: str, layers: Sequence[str]) -> list[str]:
    """The patterns that match layers of a denoiser, without its name."""
    stripped = [form for pattern in patterns for form in (pattern, pattern.removeprefix(f"{name}."))]
    return [p for p in dict.fromkeys(stripped) if any(fnmatchcase(layer, p) for layer in layers)]


def _check_layers(network: nn.Module, units: Sequence[Unit], recipe: Recipe, prefix: str) -> None:
    """Finds what cannot be quantized before minutes are spent on calibration data."""
    if adapted := next((name for name, m in network.named_modules() if hasattr(m, "base_layer")), None):
        raise ValueError(
            f"{prefix}{adapted} is a LoRA layer: make it part of the weights with pipeline.fuse_lora() and "
            "pipeline.unload_lora_weights() first"
        )
    weights = {n: cast(Tensor, m.weight) for unit in units for n, m in unit.layers.items()}
    if patterns := list(recipe.activations.token_layers):
        select_layers(list(weights), patterns, [])
    if recipe.weight_formats():
        layers_without_groups(recipe.granularity(), weights)  # an unfit group size is better found now
    for name, weight in weights.items():
        if not weight.detach().isfinite().all():
            raise ValueError(f"{prefix}{name}: its weight holds NaN or Inf; repair the model or exclude the layer")
