"""``fpq test`` and ``fpq predict``: sampling images as a LightningModule over seeds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fpq_lightning.diffusion.denoisers import as_one, quantized_denoisers
from fpq_lightning.diffusion.images import ImageDirectory
from fpq_lightning.diffusion.media import IMAGE, medium_of
from fpq_lightning.diffusion.outputs import sampling_rate
from fpq_lightning.diffusion.pipelines import load_pipeline, move_pipeline
from fpq_lightning.diffusion.sampling import SamplerConfig, batches_of, sample, set_sampler, warn_of_long_prompts
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.evaluation.evaluator import Evaluator
from fpq_lightning.evaluation.metrics import METRICS
from fpq_lightning.evaluation.sampling import SHOWN, image_settings, sample_images
from fpq_lightning.nn.hashing import hash_quantization, hash_weights
from fpq_lightning.storage.pipeline import is_quantized, load_quantized, pipeline_arguments_of, read_description
from fpq_lightning.utils import distributed
from fpq_lightning.utils.provenance import fingerprint
from fpq_lightning.utils.temporary import remove_leftovers
from fpq_lightning.utils.tf32 import using_tf32

logger = logging.getLogger(__name__)


class SeedDataModule(pl.LightningDataModule):
    """This process's batches of image seeds and prompts.

    Args:
        seeds: seeds of the images.
        batch_size: images that are sampled at once.
        prompts: a prompt for each image, or None.
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
        model: directory or hub id of a pipeline, quantized or not.
        sampler: how images are sampled.
        evaluation: what quality is measured on, for ``test`` only.
        pipeline_arguments: of ``from_pretrained``, for a full-precision model; a quantized one has kept its own.
        kind: class to open the pipeline as; `DiffusionPipeline` takes its own. The full-precision model is opened as
            the same.

    Raises:
        ValueError: if they are given for a quantized model, or one cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        sampler: SamplerConfig,
        evaluation: EvaluationConfig | None = None,
        pipeline_arguments: Mapping[str, Any] | None = None,
        kind: type[DiffusionPipeline] = DiffusionPipeline,
    ) -> None:
        super().__init__()
        self.sampler = sampler
        self.quantized = is_quantized(model)
        arguments = pipeline_arguments_of(model) if self.quantized else dict(pipeline_arguments or {})
        if self.quantized and pipeline_arguments:
            raise ValueError("pipeline_arguments are kept by a quantized model: leave them out")
        if self.quantized:
            self.pipeline = load_quantized(model, kind)
        else:
            self.pipeline = load_pipeline(model, arguments=arguments, kind=kind)
        self.reference: DiffusionPipeline | None = None
        if evaluation is not None:
            reference = evaluation.reference
            if reference is None and self.quantized:
                reference = read_description(model).get("base_model")
            if reference is not None:
                try:
                    self.reference = load_pipeline(reference, arguments=arguments, kind=type(self.pipeline))
                except (FileNotFoundError, ValueError) as error:
                    raise ValueError(
                        f"the full-precision model to compare with cannot be loaded ({error}): give its place with "
                        "--evaluation.reference"
                    ) from error
        self.evaluator = None if evaluation is None else Evaluator(evaluation, sampler)
        self.variant = "quantized" if self.quantized else "images"
        self.values: dict[str, Any] = {}  # results of the test
        self.shown: dict[str, list[Tensor]] = {}  # first images of each variant
        self._directories: dict[str, ImageDirectory] = {}

    def setup(self, stage: str) -> None:
        """Moves the pipelines to the device."""
        for pipeline in (self.pipeline, self.reference):
            if pipeline is not None:
                move_pipeline(pipeline, self.trainer.strategy.root_device)
                set_sampler(pipeline, self.sampler)
        if self.trainer.is_global_zero:
            module = cast(SeedDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]
            prompts = self.sampler.prompts_of(module.seeds) if module.prompts is None else module.prompts
            warn_of_long_prompts(self.pipeline, prompts or ())
        if self.evaluator is not None:
            self.metrics = self.evaluator.metrics(self.trainer.strategy.root_device)
            if self.evaluator.config.images is not None:
                root = Path(self.evaluator.config.images)
                self._directories = {name: ImageDirectory(root / name, s) for name, s in self.settings().items()}

    def settings(self) -> dict[str, dict[str, Any]]:
        """What decides the images of each variant."""
        variants = {self.variant: self.pipeline, "full_precision": self.reference}
        found = {}
        for name, pipeline in ((name, p) for name, p in variants.items() if p is not None):
            modules = {k: v for k, v in pipeline.components.items() if isinstance(v, nn.Module)}
            weights = fingerprint({key: hash_weights(module) for key, module in modules.items()})
            quantization = hash_quantization(as_one(quantized_denoisers(pipeline)), "quantized")
            found[name] = image_settings(weights, self.sampler, quantization)
        return found

    def _images(self, pipeline: DiffusionPipeline, seeds: Sequence[int]) -> Tensor:
        variant = "full_precision" if pipeline is self.reference else self.variant
        images = sample_images(pipeline, self.sampler, seeds, self._directories.get(variant))
        shown = self.shown.setdefault(variant, [])
        shown.append(images[: max(0, SHOWN - sum(map(len, shown)))])
        return images

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Compares the images of a batch of seeds."""
        seeds = batch["seeds"]
        images = self._images(self.pipeline, seeds)
        reference = images if self.reference is None else self._images(self.reference, seeds)
        with using_tf32(False):
            self.metrics.update(
                images,
                reference,
                prompts=self.sampler.prompts_of(seeds),
                sampling_rate=sampling_rate(self.pipeline),
            )

    def on_test_epoch_end(self) -> None:
        """Logs the metrics; those that need a reference are left out without one."""
        assert self.evaluator is not None
        with using_tf32(False):
            values = self.metrics.compute()
        if self.reference is None:
            relative = {column.key for metric in METRICS if metric.needs_reference for column in metric.columns}
            values = {key: None if key in relative else value for key, value in values.items()}
        self.values = {**values, "n_images": self.evaluator.config.n_images}
        # The values already are those of all processes.
        self.log_dict({k: v for k, v in values.items() if v is not None}, rank_zero_only=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Images of a batch of seeds and prompts."""
        images = sample(self.pipeline, self.sampler, batch["seeds"], batch["prompts"])
        return {"seeds": batch["seeds"], "images": images, "sampling_rate": sampling_rate(self.pipeline)}


class WriteImages(pl.Callback):
    """Writes predicted images as ``<seed>.png``, videos as ``.webp``, sounds as ``.wav`` and latents as ``.npy``.

    Args:
        output: directory.
    """

    def __init__(self, output: str) -> None:
        self.output = Path(output)
        self.output.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.output)
        self._medium = IMAGE

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
        self._medium = medium_of(outputs["images"])
        for seed, image in zip(outputs["seeds"], outputs["images"], strict=True):
            self._medium.save(image, self.output / f"{seed:06d}{self._medium.suffix}", outputs["sampling_rate"])

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs where they are."""
        if trainer.is_global_zero:
            logger.info("wrote %s to %s", self._medium.plural, self.output)
