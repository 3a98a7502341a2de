"""Peak signal-to-noise ratio to the full-precision images of the same seeds."""

from __future__ import annotations

from torchmetrics.image import PeakSignalNoiseRatio

from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric


class PSNR(PeakSignalNoiseRatio):
    """Mean over images of 10 log10(4 / MSE), in dB: images are in [-1, 1].

    Example:
        >>> import torch
        >>> metric = PSNR()
        >>> metric.update(torch.full((1, 3, 4, 4), 0.2), torch.zeros(1, 3, 4, 4))  # MSE 0.04
        >>> round(metric.compute().item(), 3)
        20.0
    """

    def __init__(self) -> None:
        super().__init__(data_range=(-1.0, 1.0), dim=(1, 2, 3), reduction="elementwise_mean")


METRICS.register(
    ImageMetric(
        name="psnr",
        help="Peak signal-to-noise ratio to the full-precision images of the same seeds.",
        columns=(Column("psnr", "PSNR dB", 2, plot="linear"),),
        inputs=("images", "reference"),
        make=lambda config: PSNR(),
        pinned=True,
    )
)
