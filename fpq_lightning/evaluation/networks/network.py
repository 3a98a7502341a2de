"""What metrics on features need of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

Features = Mapping[str, Tensor]


class FeatureNetwork(nn.Module):
    """A network that describes images by features, on which distributions of images are compared.

    Attributes:
        name: in messages and statistics files.
        num_features: width of the pooled features.
        classes: names of the classes in the order of the logits; empty if they have no names.
    """

    name: str
    num_features: int
    classes: Sequence[str] = ()

    def describe(self, images: Tensor) -> Features:
        """Features of images `[n, 3, height, width]` in [-1, 1].

        Returns:
            ``pooled`` `[n, num_features]` and, where the network has them, ``logits`` and ``spatial``.
        """
        raise NotImplementedError
