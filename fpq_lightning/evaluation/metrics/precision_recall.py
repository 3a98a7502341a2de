"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991) on any feature network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
    """Precision: share of the images on the manifold of the reference. Recall: share of the reference on the images'.

    Args:
        features: network that gives features `[n, d]` of images.
        k: neighbours that decide the radius of a point.
    """

    higher_is_better = True

    def __init__(self, features: nn.Module, k: int = 3) -> None:
        super().__init__(features)
        self.k = k

    def compute(self) -> dict[str, Tensor]:
        """``precision`` and ``recall`` in [0, 1].

        Raises:
            ValueError: if there are not more than k images of either kind.
        """
        images, reference = self.both(at_least=self.k + 1)
        return {
            "precision": coverage(images, reference, manifold_radii(reference, self.k)),
            "recall": coverage(reference, images, manifold_radii(images, self.k)),
        }
