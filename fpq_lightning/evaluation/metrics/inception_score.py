"""Inception Score of a set of images (Salimans et al. 2016, arXiv 1606.03498)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric


class InceptionScore(Metric):
    """exp of the mean KL divergence of each image's class probabilities from their mean, over all images at once.

    Unlike torchmetrics' it does not split the images, so the score does not depend on their order.

    Example:
        >>> import torch
        >>> metric = InceptionScore()
        >>> metric.update(torch.tensor([[99.0, 0.0], [0.0, 99.0]]))  # two sure and different classes
        >>> round(metric.compute().item(), 3)
        2.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    logits: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("logits", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor) -> None:
        """Adds images by a classifier's outputs, `[n, classes]`."""
        self.logits.append(logits.double())

    def compute(self) -> Tensor:
        """The score, float64, from 1 to the number of classes."""
        logits = dim_zero_cat(self.logits)
        probabilities, log_probabilities = logits.softmax(1), logits.log_softmax(1)
        mean = probabilities.mean(0, keepdim=True)
        return (probabilities * (log_probabilities - mean.log())).sum(1).mean().exp()


_FEATURES = ImageMetric(
    name="is",
    help="Inception Score by the classes of the configured feature network.",
    columns=(Column("is", "IS", 2),),
    inputs=("logits",),
    make=lambda network: InceptionScore(),
    network="features",
)
_INCEPTION = replace(
    _FEATURES,
    name="is_inception",
    help="Inception Score by the classes of Inception.",
    columns=(Column("is_inception", "IS (Inception)", 2),),
    network="inception",
)
for _metric in (_FEATURES, _INCEPTION):
    METRICS.register(_metric)
