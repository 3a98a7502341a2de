"""Log-mel distance to the full-precision sounds of the same seeds."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from transformers.audio_utils import mel_filter_bank

from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric

_BANDS = 64
_SECONDS = 0.064  # of a window, at most
_SHORTEST = 256  # samples of a window, at least
_FLOOR = 1e-10  # power that counts as silence


@lru_cache(maxsize=4)
def _filters(window: int, sampling_rate: int) -> Tensor:
    bank = mel_filter_bank(window // 2 + 1, _BANDS, 0.0, sampling_rate / 2, sampling_rate)
    return torch.from_numpy(bank).float()


def log_mel(sounds: Tensor, sampling_rate: int) -> Tensor:
    """Log-mel spectrograms in dB.

    Windows are Hann's, a power of two of samples and at most 64 ms long, and overlap by three quarters. 64 bands of
    the HTK mel scale reach to half of the sampling rate.

    Args:
        sounds: `[..., samples]` in [-1, 1].
        sampling_rate: samples a second.

    Returns:
        `[..., bands, windows]`.
    """
    window = max(_SHORTEST, 2 ** int(math.log2(max(2.0, _SECONDS * sampling_rate))))
    shape = torch.hann_window(window, device=sounds.device)
    spectra = torch.stft(
        sounds.flatten(0, -2), window, window // 4, window=shape, pad_mode="constant", return_complex=True
    )
    power = _filters(window, sampling_rate).to(sounds.device).T @ spectra.abs().square()
    return power.clamp(min=_FLOOR).log10().mul(10).unflatten(0, sounds.shape[:-1])


class LogMelDistance(MeanMetric):
    """Log-spectral distance (Gray and Markel 1976) of mel spectrograms, in dB.

    The root of the mean square over bands of the difference in dB, averaged over windows, channels and sounds.

    Example:
        >>> import torch
        >>> metric = LogMelDistance()
        >>> noise = torch.rand(1, 1, 4096) - 0.5
        >>> metric.update(noise / 10, noise, 16000)  # a hundredth of the power in each band
        >>> round(metric.compute().item(), 3)
        20.0
    """

    higher_is_better = False  # type: ignore[assignment]

    def update(self, sounds: Tensor, reference: Tensor, sampling_rate: int) -> None:  # type: ignore[override]
        """Adds sounds `[n, channels, samples]` and their references."""
        difference = log_mel(sounds, sampling_rate) - log_mel(reference, sampling_rate)
        super().update(difference.square().mean(-2).sqrt().mean(dim=(1, 2)))


METRICS.register(
    ImageMetric(
        name="log_mel",
        help="Log-spectral distance of mel spectrograms to the full-precision sounds of the same seeds.",
        columns=(Column("log_mel", "log-mel distance", 2, unit="dB"),),
        inputs=("sounds", "reference_sounds", "sampling_rate"),
        make=lambda config: LogMelDistance(),
    )
)
