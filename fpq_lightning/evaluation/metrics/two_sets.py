"""What metrics that compare the features of two sets of images have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class TwoSets(Metric):
    """Keeps the features of images and of a reference.

    Args:
        features: network that gives features `[n, d]` of images.
    """

    is_differentiable = False
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

    def both(self, at_least: int) -> tuple[Tensor, Tensor]:
        """Features of the images and of the reference, float64 `[n, d]`.

        Raises:
            ValueError: if there are fewer than `at_least` of either.
        """
        images, reference = dim_zero_cat(self.image_features), dim_zero_cat(self.reference_features)
        if min(len(images), len(reference)) < at_least:
            raise ValueError(f"{type(self).__name__} needs at least {at_least} images of either kind")
        return images, reference
