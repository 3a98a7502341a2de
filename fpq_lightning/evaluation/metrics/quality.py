"""Quality of a set of images against the full-precision model's images of the same seeds, and against real ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from fpq_lightning.evaluation.metrics.distribution import DistributionMetrics
from fpq_lightning.utils import distributed

_ALWAYS = ("fd", "fd_real", "psnr", "ssim")  # what reports may rely on

ALONE = ("is", "clip_score", "class_accuracy")  # beginnings of what needs no reference


class QualityMetrics(nn.Module):
    """All metrics of one set of images.

    Args:
        distributions: metrics on feature networks.
        paired: further metrics that take images and their references, both `[n, 3, height, width]` in [-1, 1], by
            name.
        prompted: metrics that take images and their prompts, by name.
    """

    not_finite: Tensor

    def __init__(
        self,
        distributions: Iterable[DistributionMetrics] = (),
        paired: Mapping[str, Metric] | None = None,
        prompted: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        self.distributions = nn.ModuleList(distributions)
        # Mean over images of 10 log10(4 / MSE).
        psnr = PeakSignalNoiseRatio(data_range=(-1.0, 1.0), dim=(1, 2, 3), reduction="elementwise_mean")
        ssim = StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))
        self.paired = nn.ModuleDict({"psnr": psnr, "ssim": ssim, **(paired or {})})
        self.prompted = nn.ModuleDict(dict(prompted or {}))
        self.register_buffer("not_finite", torch.zeros(()))

    def update(
        self, images: Tensor, reference: Tensor, same_seeds: bool = True, prompts: Sequence[str] | None = None
    ) -> None:
        """Adds images.

        Args:
            images: `[n, 3, height, width]` in [-1, 1].
            reference: full-precision images.
            same_seeds: whether `reference` holds the same seeds, so that images can be compared one by one.
            prompts: of `images`.

        Raises:
            ValueError: if the images are of different sizes.
        """
        if images.shape[1:] != reference.shape[1:]:
            raise ValueError(
                f"images of {tuple(images.shape[1:])} cannot be compared with full-precision ones of "
                f"{tuple(reference.shape[1:])}: evaluation.reference must make images of the same size"
            )
        broken = ~images.flatten(1).isfinite().all(1)
        if broken.any():
            self.not_finite += broken.sum()
            return
        for distribution in cast(Sequence[DistributionMetrics], self.distributions):
            distribution.update(images, reference, prompts)
        for metric in self.paired.values() if same_seeds else ():
            cast(Metric, metric).update(images, reference)
        for metric in self.prompted.values() if prompts is not None else ():
            cast(Metric, metric).update(images, prompts)

    def compute(self, same_seeds: bool = True) -> dict[str, float | None]:
        """``fd``, ``fd_real``, ``psnr``, ``ssim`` and so on; None for what does not apply or is infinite.

        If images were not finite, ``not_finite`` is their number and nothing else is computed.
        """
        if not_finite := int(distributed.sum_over_ranks(self.not_finite.clone())):
            return {**dict.fromkeys(_ALWAYS), "not_finite": not_finite}
        values: dict[str, float | None] = dict.fromkeys(_ALWAYS)
        for distribution in cast(Sequence[DistributionMetrics], self.distributions):
            values |= {_published(name, distribution.name): v for name, v in distribution.compute().items()}
        for name, metric in self.paired.items():
            value = cast(Metric, metric).compute().item() if same_seeds else None
            values[name] = value if value is not None and math.isfinite(value) else None
        for name, metric in self.prompted.items():
            if cast(Metric, metric).update_called:
                values[name] = cast(Metric, metric).compute().item()
        return values


def _published(name: str, network: str) -> str:
    """The name of a metric, which on Inception features has one of its own."""
    if network != "inception":
        return name
    kind, _, against = name.partition("_")
    suffix = f"_{against}" if against else ""
    return {"fd": "fid", "sfd": "sfid"}.get(kind, f"{kind}_inception") + suffix
