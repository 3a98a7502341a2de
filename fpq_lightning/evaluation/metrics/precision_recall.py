"""Improved precision and recall of a set of images (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric
from fpq_lightning.evaluation.metrics.two_sets import TwoSets

_CHUNK = 1024  # rows of the distance matrix at a time


def manifold_radii(features: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th nearest neighbour among the others, `[n]`."""
    radii = []
    for chunk in features.split(_CHUNK):
        # The nearest of all is the point itself.
        radii.append(torch.cdist(chunk, features, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(k + 1).values)
    return torch.cat(radii)


def coverage(points: Tensor, manifold: Tensor, radii: Tensor) -> Tensor:
    """Share of `points` that lie within the radius of some point of `manifold`."""
    covered = [
        (torch.cdist(chunk, manifold, compute_mode="donot_use_mm_for_euclid_dist") <= radii).any(dim=1)
        for chunk in points.split(_CHUNK)
    ]
    return torch.cat(covered).double().mean()


class PrecisionRecall(TwoSets):
    """Precision is the share of images on the manifold of the reference, recall that of the reference on the images'.

    The manifold of a set is the union of balls around its points.


    Args:
        k: a point's radius is the distance to its k-th nearest neighbour.

    Example:
        >>> import torch
        >>> metric = PrecisionRecall(k=1)
        >>> metric.update(torch.tensor([[0.0], [1.0]]), real=False)
        >>> metric.update(torch.tensor([[0.0], [1.0], [8.0], [9.0]]), real=True)
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'precision': 1.0, 'recall': 0.5}
    """

    higher_is_better = True

    def __init__(self, k: int = 3) -> None:
        super().__init__()
        self.k = k

    def compute(self) -> dict[str, Tensor]:
        """``precision`` and ``recall`` in [0, 1].

        Raises:
            ValueError: if either set has at most k images.
        """
        images, reference = self.both(at_least=self.k + 1)
        return {
            "precision": coverage(images, reference, manifold_radii(reference, self.k)),
            "recall": coverage(reference, images, manifold_radii(images, self.k)),
        }


_FEATURES = ImageMetric(
    name="precision_recall",
    help="Precision and recall on the configured feature network.",
    columns=(Column("precision", "precision"), Column("recall", "recall")),
    inputs=("pooled",),
    make=lambda network: PrecisionRecall(),
    network="features",
    against="full_precision",
)
_INCEPTION = replace(
    _FEATURES,
    name="precision_recall_inception",
    help="Precision and recall on Inception features.",
    columns=(Column("precision_inception"), Column("recall_inception")),
    network="inception",
)
for _metric in (_FEATURES, _INCEPTION):
    METRICS.register(_metric)
    METRICS.register(_metric.to_real(*(Column(f"{column.key}_real") for column in _metric.columns)))
