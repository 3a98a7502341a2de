"""Kernel distance between two sets of images (KID: Bińkowski et al. 2018, arXiv 1801.01401)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric
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

    It uses all pairs of images instead of random subsets, so it has no randomness of its own. For equal distributions
    its mean is zero, and it may be negative.

    Example:
        >>> import torch
        >>> metric = KernelDistance()
        >>> metric.update(torch.tensor([[0.0], [0.0]]), real=False)
        >>> metric.update(torch.tensor([[1.0], [1.0]]), real=True)
        >>> metric.compute().item()  # 1 + 8 - 2 * 1
        7.0
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The squared discrepancy, float64.

        Raises:
            ValueError: if either set has fewer than two images.
        """
        x, y = self.both(at_least=2)
        return _mean_of_others(x) + _mean_of_others(y) - 2 * _sum(x, y) / (len(x) * len(y))


_KID = ImageMetric(
    name="kid",
    help="Kernel distance on the configured feature network.",
    columns=(Column("kid", "KID x1000", 2, scale=1e3),),
    inputs=("pooled",),
    make=lambda network: KernelDistance(),
    network="features",
    against="full_precision",
)
_KID_INCEPTION = replace(
    _KID,
    name="kid_inception",
    help="Kernel Inception distance.",
    columns=(Column("kid_inception", "KID (Inception) x1000", 2, scale=1e3),),
    network="inception",
)
for _metric in (_KID, _KID_INCEPTION):
    METRICS.register(_metric)
    METRICS.register(_metric.to_real(Column(f"{_metric.name}_real")))
