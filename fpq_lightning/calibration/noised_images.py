"""Calibration on real images that are noised to random timesteps."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import DiffusionPipeline

from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.diffusion.denoisers import find_denoisers
from fpq_lightning.diffusion.images import image_tensor, load_images


@torch.no_grad()
def noise_real_images(pipeline: DiffusionPipeline, source: str, column: str, n: int, seed: int = 0) -> CalibrationSet:
    """Makes a calibration set of real images with the noise of uniformly drawn timesteps.

    Args:
        pipeline: an unconditional pipeline of pixels; its scheduler adds the noise.
        source: a parquet file, or the name or directory of a `datasets` dataset.
        column: column of the images.
        n: number of samples.
        seed: seed that chooses images, timesteps and noise.

    Returns:
        The set, on the CPU, with equal weights.

    Raises:
        ValueError: if the dataset is empty, lacks the column, or the pipeline is conditioned or has several denoisers.
        FileNotFoundError: if there is no such dataset.
    """
    denoisers = find_denoisers(pipeline)
    if len(denoisers) > 1:
        raise ValueError(
            f"{type(pipeline).__name__} has several denoisers ({', '.join(denoisers)}): calibrate it on trajectories"
        )
    denoiser: Any = next(iter(denoisers.values()))
    if "prompt" in inspect.signature(pipeline.__call__).parameters or hasattr(pipeline, "vae"):
        raise ValueError(f"{type(pipeline).__name__} is conditioned or latent: calibrate it on trajectories")
    images = load_images(source, column)
    size = denoiser.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed % 2**64)
    chosen = torch.randint(len(images), (n,), generator=generator).tolist()
    clean = torch.stack([image_tensor(images[i][column], height, width) for i in chosen])
    timestep = torch.randint(pipeline.scheduler.config.num_train_timesteps, (n,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    noised = pipeline.scheduler.add_noise(clean, noise, timestep)
    noised = noised.to(denoiser.dtype)
    return CalibrationSet({"sample": noised, "timestep": timestep}, torch.ones(n), {"return_dict": False})
