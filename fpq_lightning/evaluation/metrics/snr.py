"""Signal-to-noise ratio to the full-precision sounds or latents of the same seeds."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torchmetrics.audio import SignalNoiseRatio

from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric


class SNR(SignalNoiseRatio):
    """Mean over samples of 10 log10 of the full-precision energy over that of the difference, in dB.

    The channels of a sound count as one signal.

    Example:
        >>> import torch
        >>> metric = SNR()
        >>> metric.update(torch.full((1, 2, 8), 0.9), torch.ones(1, 2, 8))  # a hundredth of the energy
        >>> round(metric.compute().item(), 3)
        20.0
    """

    def update(self, sounds: Tensor, reference: Tensor) -> None:  # type: ignore[override]
        """Adds sounds `[n, channels, samples]` or latents `[n, values]` and their references."""
        super().update(sounds.flatten(1).double(), reference.flatten(1).double())  # the smaller epsilon is added


_SOUNDS = ImageMetric(
    name="snr",
    help="Signal-to-noise ratio to the full-precision sounds of the same seeds.",
    columns=(Column("snr", "SNR", 2, unit="dB", headline=True),),
    inputs=("sounds", "reference_sounds"),
    make=lambda config: SNR(),
)
_LATENTS = replace(
    _SOUNDS,
    name="snr_latents",
    help="Signal-to-noise ratio to the full-precision latents of the same seeds.",
    columns=(Column("snr_latents", "SNR", 2, unit="dB", headline=True),),
    inputs=("latents", "reference_latents"),
)
for _metric in (_SOUNDS, _LATENTS):
    METRICS.register(_metric)
