"""Kernel distance between two sets of images (KID: Bińkowski et al. 2018, arXiv 1801.01401)."""

from __future__ import annotations

import torch
from torch import Tensor

from fpq_lightning.evaluation.metrics.two_sets import TwoSets

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


class KernelDistance(TwoSets):
    """Unbiased estimate of the squared maximum mean discrepancy, with the kernel ``(x . y / d + 1)^3``.

    It is over all pairs of images, not over random subsets, so that it has no randomness of its own. For equal
    distributions it is zero in the mean and may be negative.
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The squared discrepancy, float64.

        Raises:
            ValueError: if there are fewer than two images of either kind.
        """
        x, y = self.both(at_least=2)
        return _mean_of_others(x) + _mean_of_others(y) - 2 * _sum(x, y) / (len(x) * len(y))
