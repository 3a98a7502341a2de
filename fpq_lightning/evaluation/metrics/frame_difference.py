"""Mean difference of neighbouring frames: how much a video moves or flickers."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import MeanMetric

from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric


class FrameDifference(MeanMetric):
    """Mean absolute difference of neighbouring frames in levels of 255.

    What VBench (Huang et al. 2024, arXiv 2311.17982) takes temporal flickering from: flicker that quantization adds
    makes it larger than that of the full-precision videos, lost motion makes it smaller.

    Example:
        >>> import torch
        >>> metric = FrameDifference()
        >>> video = torch.tensor([-1.0, -0.8, -0.8]).reshape(1, 3, 1, 1, 1).expand(1, 3, 3, 8, 8)
        >>> metric.update(video)  # 0.2 of 2 and then nothing
        >>> round(metric.compute().item(), 3)
        12.75
    """

    def update(self, videos: Tensor) -> None:  # type: ignore[override]
        """Adds videos `[n, frames, 3, height, width]` in [-1, 1]; one of a single frame has no difference."""
        super().update(videos.diff(dim=1).abs().mean(dim=(1, 2, 3, 4)).mul(127.5))


METRICS.register(
    ImageMetric(
        name="frame_difference",
        help="Mean absolute difference of neighbouring frames, in levels of 255; compare it with full precision.",
        columns=(Column("frame_difference", "frame difference", 3),),
        inputs=("videos",),
        make=lambda config: FrameDifference(),
    )
)
