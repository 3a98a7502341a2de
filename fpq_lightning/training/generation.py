"""``fpq test`` and ``fpq predict``: a model's images as a LightningModule over seeds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fpq_lightning.diffusion.images import ImageDirectory, save_png
from fpq_lightning.diffusion.pipelines import (
    SamplerConfig,
    batches_of,
    denoiser_name,
    load_pipeline,
    sample,
    set_sampler,
    warn_of_long_prompts,
)
from fpq_lightning.evaluation.evaluate import SHOWN, EvaluationConfig, image_settings, sample_images, using_tf32
from fpq_lightning.evaluation.metrics.quality import ALONE
from fpq_lightning.nn.hashing import hash_quantization, hash_weights
from fpq_lightning.storage.pipeline import is_quantized, load_quantized, read_description
from fpq_lightning.utils import distributed
from fpq_lightning.utils.provenance import fingerprint

logger = logging.getLogger(__name__)


class SeedDataModule(pl.LightningDataModule):
    """Batches of image seeds and prompts, each process its part.

    Args:
        seeds: of the images.
        batch_size: images at a time.
        prompts: one for each image, or None.
    """

    def __init__(self, seeds: range, batch_size: int, prompts: Sequence[str] | None = None) -> None:
        super().__init__()
        self.seeds = seeds
        self.prompts = prompts
        self.batch_size = batch_size

    def _loader(self) -> DataLoader:
        world_size = distributed.world_size()
        batches = list(batches_of(range(len(self.seeds)), self.batch_size, world_size))
        mine = [
            {
                "seeds": [self.seeds[i] for i in batch],
                "prompts": None if self.prompts is None else [self.prompts[i] for i in batch],
            }
            for batch in batches[distributed.rank() :: world_size]
        ]
        return DataLoader(mine, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]

    test_dataloader = predict_dataloader = _loader


class ImageGeneration(pl.LightningModule):
    """Samples images of a (quantized) pipeline and, in ``test``, compares them with the full-precision model's.

    Args:
        model: directory or hub id; activation formats of a quantized one are applied.
        sampler: how images are sampled.
        evaluation: what quality is measured on; only for ``test``.
    """

    def __init__(self, model: str, sampler: SamplerConfig, evaluation: EvaluationConfig | None = None) -> None:
        super().__init__()
        self.sampler = sampler
        self.quantized = is_quantized(model)
        self.pipeline = load_quantized(model) if self.quantized else load_pipeline(model)
        self.reference: DiffusionPipeline | None = None
        if evaluation is not None:
            reference = evaluation.reference
            if reference is None and self.quantized:
                reference = read_description(model).get("base_model")
            if reference is not None:
                try:
                    self.reference = load_pipeline(reference)
                except (FileNotFoundError, ValueError) as error:
                    raise ValueError(
                        f"the full-precision model to compare with cannot be loaded ({error}): give its place with "
                        "--evaluation.reference"
                    ) from error
        self.evaluation = evaluation
        self.variant = "quantized" if self.quantized else "images"
        self.values: dict[str, Any] = {}  # of the test
        self.shown: dict[str, list[Tensor]] = {}  # its first images
        self._directories: dict[str, ImageDirectory] = {}

    def setup(self, stage: str) -> None:
        """Moves the pipelines to the device."""
        for pipeline in (self.pipeline, self.reference):
            if pipeline is not None:
                pipeline.to(self.trainer.strategy.root_device)
                set_sampler(pipeline, self.sampler)
        if self.trainer.is_global_zero:
            module = cast(SeedDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]
            prompts = self.sampler.prompts_of(module.seeds) if module.prompts is None else module.prompts
            warn_of_long_prompts(self.pipeline, prompts or ())
        if self.evaluation is not None:
            self.evaluation.check()
            self.metrics = self.evaluation.metrics(self.trainer.strategy.root_device)
            for variant, settings in self.settings().items() if self.evaluation.images is not None else ():
                self._directories[variant] = ImageDirectory(Path(str(self.evaluation.images)) / variant, settings)

    def settings(self) -> dict[str, dict[str, Any]]:
        """What decides the images of each variant."""
        variants = {self.variant: self.pipeline, "full_precision": self.reference}
        found = {}
        for name, pipeline in ((name, p) for name, p in variants.items() if p is not None):
            modules = {k: v for k, v in pipeline.components.items() if isinstance(v, nn.Module)}
            weights = fingerprint({key: hash_weights(module) for key, module in modules.items()})
            quantization = hash_quantization(modules[denoiser_name(pipeline)], "quantized")
            found[name] = image_settings(weights, self.sampler, quantization)
        return found

    def _images(self, pipeline: DiffusionPipeline, seeds: Sequence[int]) -> Tensor:
        variant = "full_precision" if pipeline is self.reference else self.variant
        images = sample_images(pipeline, self.sampler, seeds, self._directories.get(variant))
        shown = self.shown.setdefault(variant, [])
        shown.append(images[: max(0, SHOWN - sum(map(len, shown)))])
        return images.to(self.device)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Compares the images of a batch of seeds."""
        seeds = batch["seeds"]
        images = self._images(self.pipeline, seeds)
        reference = images if self.reference is None else self._images(self.reference, seeds)
        with using_tf32(False):
            self.metrics.update(images, reference, prompts=self.sampler.prompts_of(seeds))

    def on_test_epoch_end(self) -> None:
        """Logs the metrics; those that need a reference are left out without one."""
        values = self.metrics.compute()
        if self.reference is None:
            values = {name: value for name, value in values.items() if name.endswith("_real") or name.startswith(ALONE)}
        n_images = len(cast(EvaluationConfig, self.evaluation).seeds)
        self.values = {**dict.fromkeys(("fd", "fd_real", "psnr", "ssim")), **values, "n_images": n_images}
        # They are those of all processes already.
        self.log_dict({k: v for k, v in values.items() if v is not None}, rank_zero_only=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Images of a batch of seeds and prompts."""
        images = sample(self.pipeline, self.sampler, batch["seeds"], batch["prompts"])
        return {"seeds": batch["seeds"], "images": images}


class WriteImages(pl.Callback):
    """Writes predicted images as ``<seed>.png``.

    Args:
        output: directory.
    """

    def __init__(self, output: str) -> None:
        self.output = Path(output)
        self.output.mkdir(parents=True, exist_ok=True)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the images of a batch."""
        for seed, image in zip(outputs["seeds"], outputs["images"], strict=True):
            save_png(image, self.output / f"{seed:06d}.png")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says where they are."""
        if trainer.is_global_zero:
            logger.info("wrote images to %s", self.output)
