"""Structural similarity to the full-precision images of the same seeds (Wang et al. 2004)."""

from __future__ import annotations

from torchmetrics.image import StructuralSimilarityIndexMeasure

from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric


class SSIM(StructuralSimilarityIndexMeasure):
    """Mean structural similarity of images in [-1, 1]; 1 for equal images.

    Example:
        >>> import torch
        >>> metric = SSIM()
        >>> images = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
        >>> metric.update(images, images)
        >>> round(metric.compute().item(), 3)
        1.0
    """

    def __init__(self) -> None:
        super().__init__(data_range=(-1.0, 1.0))


METRICS.register(
    ImageMetric(
        name="ssim",
        help="Structural similarity to the full-precision images of the same seeds.",
        columns=(Column("ssim", "SSIM", 4),),
        inputs=("images", "reference"),
        make=lambda config: SSIM(),
        pinned=True,
    )
)
