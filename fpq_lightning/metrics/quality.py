"""Quality of a set of images against the full-precision model's images of the same seeds, and against real ones."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance

from fpq_lightning import distributed

_STATES = ("features_sum", "features_cov_sum", "features_num_samples")


class FrechetDistance(FrechetInceptionDistance):
    """Fréchet distance (Heusel et al. 2017) on any feature network that takes images in [-1, 1]."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__(feature=features, reset_real_features=False)

    def save_statistics(self, file: str | Path) -> None:
        """Writes the sums that describe the reference images."""
        save_file({name: getattr(self, f"real_{name}").cpu() for name in _STATES}, file)

    def load_statistics(self, file: str | Path) -> None:
        """Takes reference images from what `save_statistics` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no statistics file {file}: correct evaluation.real or set it to null")
        if distributed.rank() == 0:  # the processes' sums are added up
            for name, value in load_file(file).items():
                setattr(self, f"real_{name}", value.to(self.device))


class QualityMetrics(nn.Module):
    """All metrics of one set of images.

    Args:
        features: network for Fréchet distances in image range [-1, 1], or None to leave them out.
        real_statistics: file of `FrechetDistance.save_statistics` of real images, or None.
    """

    not_finite: Tensor

    def __init__(self, features: nn.Module | None = None, real_statistics: str | Path | None = None) -> None:
        super().__init__()
        self.fd = None if features is None else FrechetDistance(features)
        self.fd_real = None
        if features is not None and real_statistics is not None:
            self.fd_real = FrechetDistance(features)
            self.fd_real.load_statistics(real_statistics)
        # Mean over images of 10 log10(4 / MSE).
        self.psnr = PeakSignalNoiseRatio(data_range=(-1.0, 1.0), dim=(1, 2, 3), reduction="elementwise_mean")
        self.ssim = StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))
        self.register_buffer("not_finite", torch.zeros(()))

    def update(self, images: Tensor, reference: Tensor, same_seeds: bool = True) -> None:
        """Adds images.

        Args:
            images: `[n, 3, height, width]` in [-1, 1].
            reference: full-precision images.
            same_seeds: whether `reference` holds the same seeds, so that images can be compared one by one.
        """
        if not images.isfinite().all():
            self.not_finite.fill_(1)
            return
        if self.fd is not None:
            self.fd.update(images, real=False)
            self.fd.update(reference, real=True)
        if self.fd_real is not None:
            self.fd_real.update(images, real=False)
        if same_seeds:
            self.psnr.update(images, reference)
            self.ssim.update(images, reference)

    def compute(self, same_seeds: bool = True) -> dict[str, float | None]:
        """fd, fd_real, psnr and ssim; None for what does not apply or is not finite."""
        metrics: dict[str, Metric | None] = {"fd": self.fd, "fd_real": self.fd_real, "psnr": None, "ssim": None}
        if same_seeds:
            metrics |= {"psnr": self.psnr, "ssim": self.ssim}
        finite = not distributed.sum_over_ranks(self.not_finite.clone())
        values = {name: metric.compute().item() if metric and finite else None for name, metric in metrics.items()}
        return {name: v if v is not None and math.isfinite(v) else None for name, v in values.items()}
