"""LPIPS to the full-precision images of the same seeds (Zhang et al. 2018, arXiv 1801.03924)."""

from __future__ import annotations

from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric

METRICS.register(
    ImageMetric(
        name="lpips",
        help="Learned perceptual distance to the full-precision images of the same seeds (evaluation.lpips).",
        columns=(Column("lpips", "LPIPS", 4),),
        inputs=("images", "reference"),
        make=lambda config: None if config.lpips is None else LearnedPerceptualImagePatchSimilarity(config.lpips),
    )
)
