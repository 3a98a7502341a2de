"""All that one feature network says about two sets of images; the network runs once for all metrics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.inception import InceptionScore

from fpq_lightning.evaluation.metrics.frechet import FrechetDistance
from fpq_lightning.evaluation.metrics.kernel import KernelDistance
from fpq_lightning.evaluation.metrics.precision_recall import PrecisionRecall
from fpq_lightning.evaluation.metrics.prompted_class import PromptedClassAccuracy

warnings.filterwarnings("ignore", message="Metric `InceptionScore` will save all extracted features")
warnings.filterwarnings("ignore", message=r"std\(\): degrees of freedom")  # of the one split

Features = Mapping[str, Tensor]


class _Given(nn.Identity):
    """Stands where a metric expects a network, and is given features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class DistributionMetrics(nn.Module):
    """Fréchet and kernel distance, precision, recall, Inception Score and class accuracy on one feature network.

    Args:
        network: gives features of images in [-1, 1]; one with `describe` gives a mapping of ``pooled`` features and,
            if it has them, ``logits`` and ``spatial`` ones. Must have `num_features`, and `num_spatial_features` for
            the latter; and `classes`, their names in the order of the logits, for the accuracy of prompted classes.
        real_statistics: file of `FrechetDistance.save_statistics` of real images.
        real: features of this process's part of real images, instead.
    """

    def __init__(
        self, network: nn.Module, real_statistics: str | Path | None = None, real: Features | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.name: str = getattr(network, "name", "")
        given = _Given(int(network.num_features))  # type: ignore[arg-type]
        against = {"": True, "_real": real is not None}
        self.distances = nn.ModuleDict({f"fd{suffix}": FrechetDistance(given) for suffix, on in against.items() if on})
        if hasattr(network, "num_spatial_features"):
            spatial = _Given(int(network.num_spatial_features))  # type: ignore[arg-type]
            self.distances.update({f"sfd{suffix}": FrechetDistance(spatial) for suffix, on in against.items() if on})
        for suffix in (suffix for suffix, on in against.items() if on):
            self.distances[f"kid{suffix}"] = KernelDistance(given)
            self.distances[f"pr{suffix}"] = PrecisionRecall(given)
        self.score: InceptionScore | None = None  # made when the network turns out to have logits
        self.accuracy: PromptedClassAccuracy | None = None  # made when there are prompts
        if real is not None:
            self._update(real, "_real", is_reference=True)
        elif real_statistics is not None:
            self.distances["fd_real"] = FrechetDistance(given)
            self.distances["fd_real"].load_statistics(real_statistics, self.name)  # type: ignore[operator]

    @torch.no_grad()
    def describe(self, images: Tensor) -> Features:
        """Features of images."""
        describe = getattr(self.network, "describe", None)
        return {"pooled": self.network(images)} if describe is None else describe(images)

    def _update(self, features: Features, suffix: str, is_reference: bool) -> None:
        for kind, source in (("fd", "pooled"), ("sfd", "spatial"), ("kid", "pooled"), ("pr", "pooled")):
            if f"{kind}{suffix}" in self.distances:
                self.distances[f"{kind}{suffix}"].update(features[source], real=is_reference)  # type: ignore[operator]

    def update(self, images: Tensor, reference: Tensor, prompts: Sequence[str] | None = None) -> None:
        """Adds images of both sets, `[n, 3, height, width]` in [-1, 1], and the prompts of `images`."""
        found = self.describe(images)
        self._update(found, "", is_reference=False)
        self._update(self.describe(reference), "", is_reference=True)
        self._update(found, "_real", is_reference=False)
        if "logits" in found:
            if self.score is None:
                # One split: the result does not depend on the order of images.
                self.score = InceptionScore(feature=_Given(found["logits"].shape[1]), splits=1).to(images.device)
            self.score.update(found["logits"].double())
            if prompts is not None and hasattr(self.network, "classes"):
                if self.accuracy is None:
                    self.accuracy = PromptedClassAccuracy(self.network.classes).to(images.device)  # type: ignore[arg-type]
                self.accuracy.update(found["logits"], prompts)

    def compute(self) -> dict[str, float | None]:
        """``fd``, ``sfd``, ``kid``, ``precision``, ``recall`` and ``is``; to real images with the suffix ``_real``.

        With prompts ``class_accuracy`` and its interval, too.

        None for what is not finite or needs more images.
        """
        values: dict[str, float | None] = {}
        for key, metric in self.distances.items():
            kind, _, against = key.partition("_")
            suffix = f"_{against}" if against else ""
            found = _computed(metric)
            if kind == "pr":
                pair = found if isinstance(found, dict) else {"precision": None, "recall": None}
                values |= {f"{name}{suffix}": pair[name] for name in ("precision", "recall")}
            else:
                values[key] = None if isinstance(found, dict) else found
        if self.score is not None:
            values["is"] = self.score.compute()[0].item()
        if self.accuracy is not None and isinstance(found := _computed(self.accuracy), dict):
            values |= found
        return {name: v if v is not None and math.isfinite(v) else None for name, v in values.items()}


def _computed(metric: nn.Module) -> float | dict[str, float] | None:
    assert isinstance(metric, Metric)
    try:
        found = metric.compute()
    except (ValueError, RuntimeError):  # too few images
        return None
    return {k: v.item() for k, v in found.items()} if isinstance(found, dict) else found.item()
