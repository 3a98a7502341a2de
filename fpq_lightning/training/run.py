"""A calibration from its options to its files: the path that the command line and `quantize` share."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import DiffusionPipeline
from lightning.pytorch.loggers import TensorBoardLogger

from fpq_lightning.calibration.key import CalibrationKey
from fpq_lightning.calibration.shards import Shard
from fpq_lightning.diffusion.denoisers import as_one, find_denoisers
from fpq_lightning.diffusion.pipelines import arguments_to_open, check_as_configured, check_as_loaded
from fpq_lightning.diffusion.sampling import SamplerConfig
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.evaluation.evaluator import Evaluator
from fpq_lightning.evaluation.report.markdown import recipe_phrase
from fpq_lightning.nn.calibrated import quantized_layers
from fpq_lightning.nn.hashing import hash_weights
from fpq_lightning.nn.packed_layer import packed_layers
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.training.callbacks.checkpoint import RunCheckpoint
from fpq_lightning.training.callbacks.finalize import FinalizeQuantization
from fpq_lightning.training.callbacks.image_quality import ImageQuality
from fpq_lightning.training.callbacks.progress import CalibrationProgress
from fpq_lightning.training.callbacks.report import RunReport
from fpq_lightning.training.datamodule import CalibrationDataModule
from fpq_lightning.training.estimate import estimate_run
from fpq_lightning.training.module import BlockReconstruction
from fpq_lightning.training.rehearsal import rehearse
from fpq_lightning.training.run_directory import RunDirectory, RunState
from fpq_lightning.training.strategy import PRECISIONS, calibration_trainer, check_trainer, together
from fpq_lightning.utils.provenance import versions

logger = logging.getLogger(__name__)


class RunFinishedError(ValueError):
    """The run directory holds this run, finished."""


@dataclass
class Run:
    """A calibration that is ready to start; of `prepare_run`.

    Attributes:
        directory: of the run.
        module: the LightningModule.
        data: the calibration set.
        sampler: how images are sampled.
        evaluation: what image quality is measured on.
        callbacks: what the run does besides optimising.
        precision: of the trainer.
        estimated_seconds: that the run takes, once `log_estimate` has found out.
    """

    directory: RunDirectory
    module: BlockReconstruction
    data: CalibrationDataModule
    sampler: SamplerConfig
    evaluation: EvaluationConfig
    callbacks: list[pl.Callback]
    precision: str
    estimated_seconds: float = 0.0

    def trainer(self, trainer_class: type[pl.Trainer] = pl.Trainer, **options: Any) -> pl.Trainer:
        """A trainer with the callbacks of the run.

        Args:
            trainer_class: of the trainer.
            options: of the trainer; its callbacks come first.

        Raises:
            ValueError: if an option of it is not supported, or there are more processes than samples in a batch or
                images.
        """
        if options.get("logger") is None:
            options["logger"] = TensorBoardLogger(self.directory.path, name="", version="logs")
        # The bar of the calibration ends before the next one begins.
        progress = [CalibrationProgress()] if options.get("enable_progress_bar") in (None, True) else []
        options["callbacks"] = [*(options.get("callbacks") or []), *progress, *self.callbacks]
        trainer = calibration_trainer(trainer_class, **options)
        check_trainer(trainer)
        if trainer.precision != self.precision:  # a plugin, or a variable of the environment
            raise ValueError(f"the trainer's precision is {trainer.precision}: give it as trainer.precision")
        batch_size = self.module.recipe.rounding.batch_size
        Shard(min(batch_size, self.data.n_train_of(self.data.n_samples)), 0, trainer.world_size)
        check_images(self.evaluation.n_images, trainer.world_size, "--evaluation.n_images")
        return trainer

    def log_estimate(self, trainer: pl.Trainer, required: bool = False) -> None:
        """Says what the run does and will take, on the first process.

        Args:
            trainer: of `trainer`.
            required: whether an estimate is all that is asked for, so that the want of one is an error.

        Raises:
            ValueError: if so, and there is none.
        """
        if not trainer.is_global_zero:
            return
        module, device = self.module, trainer.strategy.root_device
        logger.info("recipe: %s", recipe_phrase(module.recipe.to_dict()))
        try:
            module.placement.to(device)
            estimate = estimate_run(
                module.pipeline, module.recipe, self.data, self.sampler, self.evaluation, device, trainer.world_size
            )
            self.estimated_seconds = estimate.seconds
            for line in estimate.lines():
                logger.info(line)
        except Exception as error:  # whatever the model or its scheduler may raise
            reason = " ".join(str(error).split())[:150]
            if required:
                raise ValueError(f"the run cannot be estimated: {reason}") from error
            logger.info("no estimate (%s)", reason)

    def fit(self, trainer: pl.Trainer, ckpt_path: str | Path | None) -> None:
        """Runs the calibration in its directory.

        Args:
            trainer: of `trainer`.
            ckpt_path: ``last``, or a file, to go on from.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the checkpoint does not fit, or the run was stopped before its end.
        """
        checkpoint = self._checkpoint(ckpt_path, trainer)
        # The other processes start after it, or wait for this one where something else has started them.
        if checkpoint is None and trainer.is_global_zero:
            rehearse(
                self.module, self.data, self.sampler, self.evaluation, self.directory, trainer, self.estimated_seconds
            )
        working = self.directory.working() if trainer.is_global_zero else nullcontext()
        with working, together(trainer):
            path = None if checkpoint is None else str(checkpoint)
            trainer.fit(self.module, self.data, ckpt_path=path, weights_only=True)
        plan = self.module.plan
        if not plan.finished:
            raise ValueError(
                f"{self.directory.path}: stopped before unit {plan.unit + 1} of {len(plan.steps)} was done; go on with "
                "--ckpt_path last (ckpt_path='last')"
            )
        self.module.use_quantized()
        self.module.placement.release()

    def _checkpoint(self, ckpt_path: str | Path | None, trainer: pl.Trainer) -> Path | None:
        if ckpt_path == "last":
            newest = self.directory.newest_checkpoint()
            if newest is None and trainer.is_global_zero:
                logger.info("%s has no checkpoint yet: starting from the beginning", self.directory.path)
            return newest
        if ckpt_path is None:
            return None
        file = Path(ckpt_path).expanduser()
        if not os.path.lexists(file):
            raise FileNotFoundError(f"there is no checkpoint {ckpt_path}: give last, or a file")
        self.directory.check_checkpoint(file)
        return file


def prepare_run(
    pipeline: DiffusionPipeline,
    name: str,
    recipe: Recipe,
    data: CalibrationDataModule,
    sampler: SamplerConfig,
    evaluation: EvaluationConfig,
    run_dir: str | Path,
    resume: bool,
    offload: bool = False,
    checkpoint_steps: int = 2500,
    pipeline_arguments: Mapping[str, Any] | None = None,
    precision: str = PRECISIONS[0],
) -> Run:
    """Opens a run directory and makes everything that a calibration in it needs.

    Args:
        pipeline: in full precision.
        name: of the model in the reports.
        recipe: what to quantize to.
        data: the calibration set; the caller's may serve another run.
        sampler: how images are sampled.
        evaluation: what image quality is measured on.
        run_dir: of the run.
        resume: whether to go on with a run that is there.
        offload: keep the blocks of the denoisers in host memory.
        checkpoint_steps: optimisation steps between checkpoints within a unit.
        pipeline_arguments: that the pipeline was loaded with, besides its place and type.
        precision: of the trainer, the only option of it that changes the result and may be given.

    Raises:
        RunFinishedError: if `run_dir` holds this run, finished.
        ValueError: if `run_dir` holds another run, or (without `resume`) this one unfinished, or the model cannot be
            quantized.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("quantization learns, which torch.inference_mode() forbids: call it outside of that")
    Evaluator(evaluation, sampler).check()
    data.check()
    denoisers = find_denoisers(pipeline, recipe.denoisers)
    if any(quantized_layers(denoiser) or packed_layers(denoiser) for denoiser in denoisers.values()):
        raise ValueError("the pipeline's denoiser is quantized already: load the full-precision model again")
    check_as_loaded(pipeline, [*denoisers, *recipe.components])
    key = CalibrationKey.of(data, sampler, hash_weights(as_one(denoisers)))
    kinds = {component: type(denoiser).__name__ for component, denoiser in denoisers.items()}
    kind = kinds if len(kinds) > 1 else next(iter(kinds.values()))
    parts: dict[str, Any] = {
        "model": {
            "name": name,
            "pipeline": type(pipeline).__name__,
            "class": kind,
            "weights": key.model_weights,
        },
        "recipe": recipe.to_dict(),
        "calibration": {**data.identity(), "sampler": key.sampler},
        "trainer": {"precision": precision},
        "version": versions()["fpq-lightning"],
    }
    if loaded_with := {**arguments_to_open(pipeline), **(pipeline_arguments or {})}:
        parts["model"]["pipeline_arguments"] = loaded_with
    directory = RunDirectory(run_dir, parts)
    state = directory.state()
    damage = directory.damage() if state is RunState.FINISHED else None
    if state is RunState.FINISHED and damage is None:
        raise RunFinishedError(
            f"{directory.path} holds this run, finished: use load_quantized({str(directory.quantized)!r}), or delete "
            "it to run again"
        )
    if state is not RunState.NEW and not resume:
        raise ValueError(
            f"{directory.path} holds this run, {'unfinished' if damage is None else f'damaged ({damage})'}: add "
            "--ckpt_path last (ckpt_path='last') to go on with it"
        )
    if damage is not None:
        logger.warning("%s: what is damaged is written again (%s)", directory.path, damage)
    data = copy.copy(data)
    data.key, data.sampler = key, sampler
    data.directory = data.directory or str(directory.path / "calibration")
    data.store_directory = data.store_directory or str(directory.activations)
    module = BlockReconstruction(pipeline, recipe, data, offload)
    for denoiser in denoisers.values():
        check_as_configured(denoiser)  # after what it says of adapters
    module.made_from = directory.parts
    quality = ImageQuality(evaluation, sampler, directory)
    quality.check()
    callbacks = [
        FinalizeQuantization(directory, name),
        quality,
        RunReport(directory, quality),
        RunCheckpoint(directory.checkpoints, checkpoint_steps),
    ]
    return Run(directory, module, data, sampler, evaluation, callbacks, precision)


def check_images(n: int, world_size: int, option: str) -> None:
    """Finds out that some process would get no images.

    Raises:
        ValueError: if so.
    """
    if 0 < n < world_size:
        raise ValueError(f"{option} {n} is less than the {world_size} processes: raise it or take fewer devices")
