"""LPIPS to the full-precision images of the same seeds (Zhang et al. 2018, arXiv 1801.03924)."""

from __future__ import annotations

from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric
from fpq_lightning.utils.resources import find_checkpoint

_CHECKPOINTS = {  # of torchvision
    "LPIPS alex": "alexnet-owt-7be5be79.pth",
    "LPIPS vgg": "vgg16-397923af.pth",
    "LPIPS squeeze": "squeezenet1_1-b8a52dc0.pth",
}

METRICS.register(
    ImageMetric(
        name="lpips",
        help="Learned perceptual distance to the full-precision images of the same seeds (evaluation.lpips).",
        columns=(Column("lpips", "LPIPS", 4),),
        inputs=("images", "reference"),
        make=lambda config: None if config.lpips is None else LearnedPerceptualImagePatchSimilarity(config.lpips),
        weights=lambda: {name: find_checkpoint(file) for name, file in _CHECKPOINTS.items()},
    )
)
