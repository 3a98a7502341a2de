"""Evaluation by images: each variant of a model samples the same seeds, and metrics compare them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fpq_lightning import distributed
from fpq_lightning.layers import Mode, running
from fpq_lightning.metrics.features import FeatureNetwork
from fpq_lightning.metrics.quality import QualityMetrics
from fpq_lightning.pipelines import SamplerConfig, batches_of, denoiser_name, sample, using_sampler


@dataclass
class EvaluationConfig:
    """What quality is measured on.

    Attributes:
        n_images: images of each variant; 0 leaves evaluation out.
        seed: of the first image; image i has seed + i.
        features: directory of the feature network, or null to leave Fréchet distances out.
        real: statistics file of real images, or null.
        reference: for `fpq test`, the full-precision model to compare with; null takes the one that was quantized.
    """

    n_images: int = 64
    seed: int = 0
    features: str | None = None
    real: str | None = None
    reference: str | None = None

    def __post_init__(self) -> None:
        if self.n_images < 0 or self.n_images == 1:
            raise ValueError(f"evaluation.n_images must be 0 or at least 2, got {self.n_images}")
        if self.features is not None:
            FeatureNetwork.load(self.features)
        if self.real is not None and self.features is None:
            raise ValueError("evaluation.real needs evaluation.features, the network whose statistics it holds")
        if self.real is not None and not Path(self.real).is_file():
            raise ValueError(f"there is no statistics file {self.real}: correct evaluation.real or set it to null")

    def metrics(self) -> QualityMetrics:
        """Fresh metrics."""
        features = None if self.features is None else FeatureNetwork.load(self.features)
        return QualityMetrics(features, self.real)

    @property
    def seeds(self) -> range:
        """Seeds of the images."""
        return range(self.seed, self.seed + self.n_images)


def sample_variant(
    pipeline: DiffusionPipeline,
    sampler: SamplerConfig,
    seeds: range,
    mode: Mode,
    on_batch: Callable[[int], object] = lambda n: None,
) -> Tensor:
    """This process's part of the images of one variant, `[n, 3, height, width]` in [-1, 1], on the CPU.

    The first images are the first process's.
    """
    images = []
    world_size = distributed.world_size()
    batches = list(batches_of(seeds, sampler.batch_size, world_size))
    with using_sampler(pipeline, sampler), running(getattr(pipeline, denoiser_name(pipeline)), mode):
        for batch in batches[distributed.rank() :: world_size]:
            images.append(sample(pipeline, sampler, batch))
            on_batch(len(batch))
    return torch.cat(images)


def compare(
    metrics: QualityMetrics, images: Tensor, reference: Tensor, device: torch.device, same_seeds: bool = True
) -> dict[str, Any]:
    """Metrics of a set of images against full-precision ones, each process giving its part."""
    metrics.to(device)
    for a, b in zip(images.split(250), reference.split(250), strict=True):
        metrics.update(a.to(device), b.to(device), same_seeds)
    n_images = distributed.sum_over_ranks(torch.tensor(len(images), device=device))
    return {**metrics.compute(same_seeds), "n_images": int(n_images)}
