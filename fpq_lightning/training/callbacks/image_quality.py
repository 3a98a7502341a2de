"""Image quality of a quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fpq_lightning.diffusion.images import ImageDirectory
from fpq_lightning.diffusion.outputs import sampling_rate
from fpq_lightning.diffusion.sampling import SamplerConfig
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.evaluation.evaluator import Evaluator
from fpq_lightning.evaluation.sampling import SHOWN, image_settings, sample_variant
from fpq_lightning.nn.calibrated import Mode
from fpq_lightning.nn.hashing import hash_quantization
from fpq_lightning.training.module import BlockReconstruction
from fpq_lightning.training.run_directory import RunDirectory
from fpq_lightning.utils.progress import progress_bar
from fpq_lightning.utils.provenance import fingerprint


class ImageQuality(pl.Callback):
    """At the end of the calibration samples the same seeds with each variant of the model and compares them.

    Variants are the full-precision model, the model rounded to nearest, and the quantized model.

    Attributes:
        variants: metrics by variant, as in `report.json`.
        samples: the first images (or videos, sounds, latents) of each variant.

    Args:
        config: what quality is measured on.
        sampler: how images are sampled.
        run: its directory keeps the images, so that an interrupted evaluation continues.
    """

    def __init__(self, config: EvaluationConfig, sampler: SamplerConfig, run: RunDirectory) -> None:
        self.config = config
        self.sampler = sampler
        self.evaluator = Evaluator(config, sampler)
        self.run = run
        self.variants: dict[str, dict[str, Any]] = {}
        self.samples: dict[str, Tensor] = {}

    def check(self) -> None:
        """Finds images of another model or sampler before hours are spent.

        Raises:
            ValueError: if there are any.
        """
        if self.config.n_images:
            self._directory("full_precision")

    def _directory(self, variant: Mode, module: BlockReconstruction | None = None) -> ImageDirectory:
        root = self.run.images if self.config.images is None else Path(self.config.images)
        weights = self.run.parts["model"]["weights"]
        if module is None:
            return ImageDirectory(root / variant, image_settings(weights, self.sampler))
        # A calibration that starts over may end differently, so its images must not be mixed with earlier ones.
        components = {k: v for k, v in module.pipeline.components.items() if isinstance(v, nn.Module)}
        quantization = fingerprint({name: hash_quantization(part, variant) for name, part in components.items()})
        settings = image_settings(weights, self.sampler, quantization)
        return ImageDirectory(root / f"{variant}-{quantization[:8]}", settings)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Samples and compares."""
        assert isinstance(pl_module, BlockReconstruction)
        if not pl_module.plan.finished or not self.config.n_images:
            return
        n, seeds = self.config.n_images, self.config.seeds
        device = pl_module.device
        pl_module.placement.to(device)
        share = 4 * n // trainer.world_size  # the images of this process
        hidden = not trainer.is_global_zero
        with progress_bar("sampling", total=share, unit="image", disable=hidden) as bar:

            def images(variant: Mode, seeds: range) -> Tensor:
                bar.set_description(f"sampling {variant.replace('_', ' ')}")
                directory = self._directory(variant, None if variant == "full_precision" else pl_module)
                return sample_variant(pl_module.pipeline, self.sampler, seeds, variant, bar.update, directory)

            reference = images("full_precision", seeds)
            other_seeds = images("full_precision", range(seeds.stop, seeds.stop + n))
            # The noise floor: the difference between two sets of full-precision images.
            rate = sampling_rate(pl_module.pipeline)
            metrics = self.evaluator.compare(reference, seeds, other_seeds, device, False, rate)
            self._keep("full_precision", reference, metrics)
            variants: tuple[Mode, ...] = ("nearest", "quantized")
            for variant in variants:
                found = images(variant, seeds)
                metrics = self.evaluator.compare(found, seeds, reference, device, sampling_rate=rate)
                self._keep(variant, found, metrics)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _keep(self, variant: str, images: Tensor, metrics: dict[str, Any]) -> None:
        self.samples[variant] = images[:SHOWN]
        seeds = self.config.seeds
        self.variants[variant] = {**metrics, "seeds": [seeds.start, seeds.stop - 1]}
