"""Judging a quantized model by its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fpq_lightning.diffusion.images import ImageDirectory
from fpq_lightning.diffusion.pipelines import SamplerConfig
from fpq_lightning.evaluation.evaluate import (
    SHOWN,
    EvaluationConfig,
    compare,
    image_settings,
    prompts_of_share,
    sample_variant,
)
from fpq_lightning.nn.calibrated import Mode
from fpq_lightning.nn.hashing import hash_quantization
from fpq_lightning.training.module import BlockReconstruction
from fpq_lightning.training.run_directory import RunDirectory
from fpq_lightning.utils.progress import progress_bar
from fpq_lightning.utils.provenance import fingerprint


class ImageQuality(pl.Callback):
    """At the end of the calibration samples the same seeds in full precision, with nearest and learned rounding.

    Attributes:
        variants: metrics by variant, as in `report.json`.
        samples: the first images of each variant, `[n, 3, height, width]` in [-1, 1].

    Args:
        config: what quality is measured on.
        sampler: how images are sampled.
        run: whose images these are; they are kept in its directory, so that evaluation goes on where it stopped.
    """

    def __init__(self, config: EvaluationConfig, sampler: SamplerConfig, run: RunDirectory) -> None:
        self.config = config
        self.sampler = sampler
        self.run = run
        self.variants: dict[str, dict[str, Any]] = {}
        self.samples: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds what is missing before hours are spent."""
        self.config.check()
        if self.config.n_images:
            self._directory("full_precision")

    def _directory(self, mode: Mode, module: BlockReconstruction | None = None) -> ImageDirectory:
        root = self.run.images if self.config.images is None else Path(self.config.images)
        weights = self.run.parts["model"]["weights"]
        if module is None:
            return ImageDirectory(root / mode, image_settings(weights, self.sampler))
        # A calibration that was begun anew may end elsewhere, so that images of the one before are not its own.
        components = {k: v for k, v in module.pipeline.components.items() if isinstance(v, nn.Module)}
        quantization = fingerprint({name: hash_quantization(part, mode) for name, part in components.items()})
        settings = image_settings(weights, self.sampler, quantization)
        return ImageDirectory(root / f"{mode}-{quantization[:8]}", settings)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Samples and compares."""
        assert isinstance(pl_module, BlockReconstruction)
        if not pl_module.plan.finished or not self.config.n_images:
            return
        n = self.config.n_images
        device = pl_module.device
        pl_module.placement.to(device)
        hidden = not trainer.is_global_zero
        share = 4 * n // trainer.world_size  # of one process, which is what the bar sees
        with progress_bar("sampling", total=share, unit="image", disable=hidden) as bar:

            def images(mode: Mode, seeds: range) -> Tensor:
                bar.set_description(f"sampling {mode.replace('_', ' ')}")
                directory = self._directory(mode, None if mode == "full_precision" else pl_module)
                return sample_variant(pl_module.pipeline, self.sampler, seeds, mode, bar.update, directory)

            reference = images("full_precision", self.config.seeds)
            other_seeds = range(self.config.seeds.stop, self.config.seeds.stop + n)
            others = images("full_precision", other_seeds)
            prompts = prompts_of_share(self.config.seeds, self.sampler)
            # The noise floor: what two full-precision sets differ by.
            metrics = compare(self.config.metrics(device), reference, others, device, False, prompts)
            self._keep("full_precision", reference, metrics)
            modes: tuple[Mode, ...] = ("nearest", "quantized")
            for mode in modes:
                found = images(mode, self.config.seeds)
                metrics = compare(self.config.metrics(device), found, reference, device, True, prompts)
                self._keep(mode, found, metrics)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _keep(self, variant: str, images: Tensor, metrics: dict[str, Any]) -> None:
        self.samples[variant] = images[:SHOWN]
        seeds = self.config.seeds
        self.variants[variant] = {**metrics, "seeds": [seeds.start, seeds.stop - 1]}
