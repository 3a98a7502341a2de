"""Sampling the images that are evaluated: the same seeds for each variant of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fpq_lightning.diffusion.images import ImageDirectory
from fpq_lightning.diffusion.media import medium_of
from fpq_lightning.diffusion.outputs import sampling_rate
from fpq_lightning.diffusion.sampling import SamplerConfig, batches_of, running_pipeline, sample, using_sampler
from fpq_lightning.nn.calibrated import Mode
from fpq_lightning.utils import distributed
from fpq_lightning.utils.tf32 import using_tf32

SHOWN = 32  # images of each variant that a report shows


def image_settings(weights: str, sampler: SamplerConfig, quantization: str | None = None) -> dict[str, Any]:
    """What decides images, apart from their seeds.

    Args:
        weights: hash of the weights.
        sampler: how images are sampled.
        quantization: hash of the quantization, None in full precision.
    """
    return {"weights": weights, "quantization": quantization, "sampler": sampler.identity()}


def sample_images(
    pipeline: DiffusionPipeline,
    sampler: SamplerConfig,
    seeds: Sequence[int],
    directory: ImageDirectory | None = None,
) -> Tensor:
    """Images (or videos, sounds, latents) of seeds as `sample` gives them, rounded as their files are.

    Image i does not depend on the batch it is sampled in, except for the last bits of float32 products; the rounding
    of activations turns these into a few levels of some pixels.

    Args:
        pipeline: in the mode wanted, with the sampler's scheduler.
        sampler: how images are sampled.
        seeds: seeds of the images.
        directory: keeps images, so that they are sampled only once.
    """

    def make(missing: Sequence[int]) -> Tensor:
        with using_tf32(False):
            images = sample(pipeline, sampler, missing)
        return torch.where(images.isfinite(), medium_of(images).rounded(images.nan_to_num()), images)

    return make(seeds) if directory is None else directory.complete(seeds, make, sampling_rate(pipeline))


def share(seeds: range, sampler: SamplerConfig) -> list[range]:
    """This process's batches of seeds; processes take turns."""
    world_size = distributed.world_size()
    return list(batches_of(seeds, sampler.batch_size, world_size))[distributed.rank() :: world_size]


def sample_variant(
    pipeline: DiffusionPipeline,
    sampler: SamplerConfig,
    seeds: range,
    mode: Mode,
    on_batch: Callable[[int], object] = lambda n: None,
    directory: ImageDirectory | None = None,
) -> Tensor:
    """This process's share of the images (or videos, sounds, latents) of one variant, on the CPU.

    Args:
        pipeline: with quantized layers, or in full precision.
        sampler: how images are sampled.
        seeds: seeds of the images of all processes; the first ones are those of the first process.
        mode: the mode of the quantized layers.
        on_batch: called with the size of each finished batch.
        directory: keeps images, so that they are sampled only once.
    """
    images = []
    with using_sampler(pipeline, sampler), running_pipeline(pipeline, mode):
        for batch in share(seeds, sampler):
            images.append(sample_images(pipeline, sampler, batch, directory))
            on_batch(len(batch))
    return torch.cat(images)
