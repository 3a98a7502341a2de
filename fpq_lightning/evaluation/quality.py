"""All metrics of one set of images, videos, sounds or latents."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from fpq_lightning.diffusion.media import IMAGE, VIDEO, medium_of
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.evaluation.metrics import METRICS, ImageMetric
from fpq_lightning.evaluation.networks.network import FeatureNetwork, Features
from fpq_lightning.utils import distributed

_BATCH = 250  # images or frames that are judged at once


class QualityMetrics(nn.Module):
    """All configured metrics of one set of images.

    Metrics whose packages or weights are missing are left out with a warning.

    Args:
        config: which metrics.
        networks: feature networks by the option that configures them, ``features`` or ``inception``.
        real: outputs of these networks for this process's share of the real images.
    """

    not_finite: Tensor

    def __init__(
        self,
        config: EvaluationConfig,
        networks: Mapping[str, FeatureNetwork] | None = None,
        real: Mapping[str, Features] | None = None,
    ) -> None:
        super().__init__()
        self.networks = dict(networks or {})
        self.register_buffer("not_finite", torch.zeros(()))
        self.used: list[tuple[ImageMetric, Metric]] = []
        for entry in METRICS:
            metric = self._make(entry, config, real or {})
            if metric is not None:
                self.used.append((entry, metric))
        self._parts = nn.ModuleList([*self.networks.values(), *(metric for _, metric in self.used)])  # move together

    def _make(self, entry: ImageMetric, config: EvaluationConfig, real: Mapping[str, Features]) -> Metric | None:
        network = None if entry.network is None else self.networks.get(entry.network)
        if entry.network is not None and network is None:
            return None
        try:
            metric: Any = entry.make(config if network is None else network)
        except (ModuleNotFoundError, OSError) as error:
            warn_left_out(f"the metric {entry.columns[0].title} is", error)
            return None
        if metric is None or network is None or entry.against != "real":
            return metric
        if (features := real.get(str(entry.network))) is not None:
            metric.to(features["pooled"].device).update(*(features[name] for name in entry.inputs), real=True)
            return metric
        if config.real_statistics is not None and entry.network == "features" and hasattr(metric, "load_statistics"):
            metric.load_statistics(config.real_statistics, network.name)
            return metric
        return None

    def update(
        self,
        images: Tensor,
        reference: Tensor,
        same_seeds: bool = True,
        prompts: Sequence[str] | None = None,
        sampling_rate: int | None = None,
    ) -> None:
        """Adds images, videos, sounds or latents, some at a time.

        Args:
            images: as `sample` gives them, on any device.
            reference: full-precision ones.
            same_seeds: whether `reference` holds the same seeds, so that they can be compared one by one.
            prompts: prompts of `images`.
            sampling_rate: of sounds.

        Raises:
            ValueError: if these and the full-precision ones differ in size.
        """
        medium = medium_of(images)
        if images.shape[1:] != reference.shape[1:]:
            raise ValueError(
                f"{medium.plural} of {tuple(images.shape[1:])} cannot be compared with full-precision ones of "
                f"{tuple(reference.shape[1:])}: evaluation.reference must make {medium.plural} of the same size"
            )
        size = max(1, _BATCH // images.shape[1]) if medium is VIDEO else _BATCH
        for start in range(0, len(images), size):
            rows = slice(start, start + size)
            a, b = (x[rows].to(self.not_finite.device) for x in (images, reference))
            self._update(a, b if same_seeds else None, b, None if prompts is None else prompts[rows], sampling_rate)

    @torch.no_grad()
    def _update(
        self,
        images: Tensor,
        paired: Tensor | None,
        reference: Tensor,
        prompts: Sequence[str] | None,
        sampling_rate: int | None,
    ) -> None:
        broken = ~images.flatten(1).isfinite().all(1)
        if broken.any():
            self.not_finite += broken.sum()
            return
        given: dict[str, Any] = {**_views(images), "sampling_rate": sampling_rate}
        if paired is not None:
            given |= {"reference" if k == "images" else f"reference_{k}": v for k, v in _views(paired).items()}
        outputs, of_reference = self._describe(images), self._describe(reference)
        if prompts is not None and "images" in given:
            frames = len(given["images"]) // len(images)
            given["prompts"] = [prompt for prompt in prompts for _ in range(frames)]
        for entry, metric in self.used:
            available = {**given, **outputs.get(str(entry.network), {})}
            if any(available.get(name) is None for name in entry.inputs):
                continue
            arguments = [available[name] for name in entry.inputs]
            if entry.against is None:
                metric.update(*arguments)
                continue
            metric.update(*arguments, real=False)
            if entry.against == "full_precision":
                metric.update(*(of_reference[str(entry.network)][name] for name in entry.inputs), real=True)

    def _describe(self, images: Tensor) -> dict[str, Features]:
        """What each network says of images or frames; nothing of what has none."""
        pixels = _views(images).get("images")
        return {} if pixels is None else {name: network.describe(pixels) for name, network in self.networks.items()}

    def compute(self) -> dict[str, float | None]:
        """The numbers of all metrics by key; None for what is infinite or needs more images.

        If images were not finite, ``not_finite`` is their number and nothing else is computed.
        """
        values: dict[str, float | None] = {
            column.key: None for entry in METRICS if entry.pinned for column in entry.columns
        }
        if not_finite := int(distributed.sum_over_ranks(self.not_finite.clone())):
            return {**values, "not_finite": not_finite}
        for entry, metric in self.used:
            if metric.update_called:
                values |= _numbers(entry, metric)
        return values


def _views(outputs: Tensor) -> dict[str, Tensor]:
    """The forms in which metrics take what a pipeline gave, by the name of the input."""
    medium = medium_of(outputs)
    views = {medium.plural: outputs}
    if medium is VIDEO and outputs.shape[1] == 1:
        views = {}  # without neighbouring frames it is an image
    if medium in (IMAGE, VIDEO):
        views["images"] = outputs.flatten(0, -4)
    return views


def _numbers(entry: ImageMetric, metric: Metric) -> dict[str, float | None]:
    keys = [column.key for column in entry.columns]
    try:
        found = metric.compute()
    except (ValueError, RuntimeError):  # too few images
        return dict.fromkeys(keys)
    numbers = [value.item() for value in (found.values() if isinstance(found, dict) else [found])]
    return {key: n if math.isfinite(n) else None for key, n in zip(keys, numbers, strict=True)}


def warn_left_out(what: str, error: Exception) -> None:
    """Warns, on the first process, that something is left out because of an error."""
    if distributed.rank() == 0:
        warnings.warn(f"{what} left out: {' '.join(str(error).split())[:200]}", stacklevel=2)
