"""Weights of text encoders and VAE: rounded to nearest on their best grid, which needs no data."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fpq_lightning.diffusion.denoisers import find_denoisers
from fpq_lightning.nn.calibrated import LayerQuantization, is_quantizable
from fpq_lightning.nn.convert import make_quantized
from fpq_lightning.quantization.quantizer import Granularity
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.quantization.search import search_tensor_error


def check_components(pipeline: DiffusionPipeline, recipe: Recipe) -> None:
    """Finds components that cannot be quantized.

    Raises:
        ValueError: if one is not there, is a denoiser, or has no layer to quantize.
    """
    denoisers = find_denoisers(pipeline, recipe.denoisers)
    modules = {k: v for k, v in pipeline.components.items() if isinstance(v, nn.Module) and k not in denoisers}
    for name in recipe.components:
        if name not in modules:
            there = f"it has {', '.join(modules)}" if modules else "it has none besides its denoiser"
            raise ValueError(f"recipe.components names {name}, which the pipeline lacks: {there}")
        if not any(is_quantizable(m) for m in modules[name].modules()):
            raise ValueError(f"recipe.components names {name}, which has no Linear or Conv layer to quantize")


@torch.no_grad()
def quantize_components(pipeline: DiffusionPipeline, recipe: Recipe) -> None:
    """Gives the layers of the recipe's components their quantization, the same in both variants."""
    for name in recipe.components:
        formats = recipe.component_formats(name)
        for layer in [m for m in getattr(pipeline, name).modules() if is_quantizable(m)]:
            quantized = make_quantized(layer, Granularity("channel"))
            quantizers = [search_tensor_error(rows, formats) for rows in quantized.weight_rows()]
            for variant in ("nearest", "quantized"):
                quantized.variants[variant] = LayerQuantization(quantizers).copy()
