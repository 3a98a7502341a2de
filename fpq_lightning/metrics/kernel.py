"""Kernel distance between two sets of images (KID: Bińkowski et al. 2018, arXiv 1801.01401)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

_CHUNK = 4096  # rows of the kernel matrix at a time


def _kernel(products: Tensor, width: int) -> Tensor:
    return (products / width + 1) ** 3


def _sum(x: Tensor, y: Tensor) -> Tensor:
    parts = [_kernel(chunk @ y.T, x.shape[1]).sum() for chunk in x.split(_CHUNK)]
    return torch.stack(parts).sum()


def _mean_of_others(x: Tensor) -> Tensor:
    """Mean kernel value of two different points."""
    diagonal = _kernel(x.square().sum(1), x.shape[1]).sum()
    return (_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))


class KernelDistance(Metric):
    """Unbiased estimate of the squared maximum mean discrepancy, with the kernel ``(x . y / d + 1)^3``.

    It is over all pairs of images, not over random subsets, so that it has no randomness of its own. For equal
    distributions it is zero in the mean and may be negative.

    Args:
        features: network that gives features `[n, d]` of images.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    image_features: list[Tensor]
    reference_features: list[Tensor]

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.add_state("image_features", [], dist_reduce_fx="cat")
        self.add_state("reference_features", [], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Adds images.

        Args:
            images: what the feature network takes, `[n, ...]`.
            real: whether they are of the reference.
        """
        (self.reference_features if real else self.image_features).append(self.features(images).double())

    def compute(self) -> Tensor:
        """The squared discrepancy, float64.

        Raises:
            ValueError: if there are fewer than two images of either kind.
        """
        x, y = dim_zero_cat(self.image_features), dim_zero_cat(self.reference_features)
        if min(len(x), len(y)) < 2:
            raise ValueError("a kernel distance needs at least 2 images of either kind")
        return _mean_of_others(x) + _mean_of_others(y) - 2 * _sum(x, y) / (len(x) * len(y))
