"""dtSSD: by how much the differences of neighbouring frames deviate from those of the full-precision video."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import MeanMetric

from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric


class DtSSD(MeanMetric):
    """Temporal inconsistency of videos of the same seeds (Erofeev et al., BMVC 2015).

    For two neighbouring frames the root of the mean square, over pixels in [0, 1], of the difference between the
    change of the video and that of the reference; averaged over neighbours and videos. A mean over pixels, not
    their sum, so that sizes can be compared. An error that stays the same in all frames does not count.

    Example:
        >>> import torch
        >>> metric = DtSSD()
        >>> reference = torch.zeros(1, 3, 3, 8, 8)
        >>> flicker = torch.tensor([0.0, 0.2, 0.0]).reshape(1, 3, 1, 1, 1)
        >>> metric.update(reference + flicker, reference)
        >>> round(metric.compute().item(), 3)
        0.1
    """

    higher_is_better = False  # type: ignore[assignment]

    def update(self, videos: Tensor, reference: Tensor) -> None:  # type: ignore[override]
        """Adds videos `[n, frames, 3, height, width]` in [-1, 1] and their references."""
        deviation = (videos.diff(dim=1) - reference.diff(dim=1)) / 2
        super().update(deviation.square().mean(dim=(2, 3, 4)).sqrt().mean(1))


METRICS.register(
    ImageMetric(
        name="dtssd",
        help="How much changes between neighbouring frames deviate from those of the full-precision video (dtSSD).",
        columns=(Column("dtssd", "dtSSD", 2, scale=100, unit="x100"),),
        inputs=("videos", "reference_videos"),
        make=lambda config: DtSSD(),
    )
)
