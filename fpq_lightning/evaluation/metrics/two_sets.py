"""The base of metrics that compare the features of two sets of images."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class TwoSets(Metric):
    """Keeps the features of the images and of a reference."""

    is_differentiable = False
    full_state_update = False
    image_features: list[Tensor]
    reference_features: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("image_features", [], dist_reduce_fx="cat")
        self.add_state("reference_features", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool) -> None:
        """Adds images.

        Args:
            features: features of the images, `[n, d]`.
            real: whether the images belong to the reference.
        """
        (self.reference_features if real else self.image_features).append(features.double())

    def both(self, at_least: int) -> tuple[Tensor, Tensor]:
        """Features of the images and of the reference, float64 `[n, d]`.

        Raises:
            ValueError: if either set has fewer than `at_least` images.
        """
        images, reference = dim_zero_cat(self.image_features), dim_zero_cat(self.reference_features)
        if min(len(images), len(reference)) < at_least:
            raise ValueError(f"{type(self).__name__} needs at least {at_least} images in each set")
        return images, reference
