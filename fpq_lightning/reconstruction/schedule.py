"""What changes over the optimisation steps of a unit."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fpq_lightning.quantization.recipe import RoundingRecipe
from fpq_lightning.quantization.rounding import beta_schedule


def schedule(steps: Iterable[int], recipe: RoundingRecipe) -> Tensor:
    """beta, strength and hardness of `UnitObjective.forward`, and the factor on the learning rates.

    Args:
        steps: numbers of the optimisation steps, of `recipe.iterations`.
        recipe: of the rounding.

    Returns:
        float32 `[steps, 4]`.
    """
    return torch.tensor([_at(step / recipe.iterations, recipe) for step in steps])


def _at(progress: float, recipe: RoundingRecipe) -> tuple[float, float, float, float]:
    beta = beta_schedule(progress, recipe.warmup)
    strength = 0.0 if beta is None else recipe.regularisation
    return beta or 2.0, strength, float(progress >= recipe.straight_through), learning_rate_factor(progress)


def learning_rate_factor(progress: float) -> float:
    """Cosine decay to zero."""
    return 0.5 + 0.5 * math.cos(math.pi * progress)
