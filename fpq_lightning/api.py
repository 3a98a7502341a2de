"""`quantize`: the path that the command line and notebooks share."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from diffusers import DiffusionPipeline
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from fpq_lightning.calibration.shards import Shard
from fpq_lightning.diffusion.pipelines import denoiser_name
from fpq_lightning.diffusion.sampling import SamplerConfig
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.evaluation.evaluator import Evaluator
from fpq_lightning.nn.calibrated import quantized_layers
from fpq_lightning.nn.hashing import hash_weights
from fpq_lightning.nn.packed import packed_layers
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.training.callbacks import (
    CalibrationProgress,
    FinalizeQuantization,
    ImageQuality,
    RunCheckpoint,
    RunReport,
)
from fpq_lightning.training.datamodule import CalibrationDataModule
from fpq_lightning.training.estimate import estimate_run
from fpq_lightning.training.module import BlockReconstruction
from fpq_lightning.training.run_directory import RunDirectory, RunState
from fpq_lightning.training.strategy import prepare_strategy, together
from fpq_lightning.utils.provenance import versions

TRAINER_DEFAULTS: dict[str, Any] = {
    "devices": 1,
    "max_epochs": -1,
    "reload_dataloaders_every_n_epochs": 1,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


def open_run(
    run_dir: str | Path,
    pipeline: DiffusionPipeline,
    name: str,
    recipe: Recipe,
    data: CalibrationDataModule,
    sampler: SamplerConfig,
) -> RunDirectory:
    """The directory of a run, with the fingerprint of everything that decides its quantized model."""
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    if quantized_layers(denoiser) or packed_layers(denoiser):
        raise ValueError("the pipeline's denoiser is quantized already: load the full-precision model again")
    parts = {
        "model": {"name": name, "class": type(denoiser).__name__, "weights": hash_weights(denoiser)},
        "recipe": recipe.to_dict(),
        "calibration": {**data.identity(), "sampler": {**sampler.identity(), "batch_size": sampler.batch_size}},
        "version": versions()["fpq-lightning"],
    }
    return RunDirectory(run_dir, parts)


def run_callbacks(
    run: RunDirectory, base_model: str, evaluation: EvaluationConfig, sampler: SamplerConfig, checkpoint_steps: int
) -> list[pl.Callback]:
    """What every calibration does besides optimising."""
    quality = ImageQuality(evaluation, sampler, run)
    return [
        FinalizeQuantization(run, base_model),
        quality,
        RunReport(run, quality),
        RunCheckpoint(run.checkpoints, checkpoint_steps),
    ]


def quantize(
    pipeline: DiffusionPipeline,
    recipe: Recipe | None = None,
    run_dir: str | Path = "runs/quantize",
    data: CalibrationDataModule | None = None,
    sampler: SamplerConfig | None = None,
    evaluation: EvaluationConfig | None = None,
    base_model: str | None = None,
    ckpt_path: str | None = None,
    offload: bool = False,
    **trainer_options: Any,
) -> DiffusionPipeline:
    """Quantizes the denoiser of a pipeline in place.

    Args:
        pipeline: a diffusers pipeline in full precision.
        recipe: what to quantize to; FP4 weights and FP8 activations with learned rounding by default.
        run_dir: where checkpoints, the quantized pipeline and the reports go.
        data: the calibration set; sampled along the pipeline's own trajectories by default.
        sampler: how images are sampled, for calibration and evaluation.
        evaluation: what image quality is measured on; left out by default.
        base_model: name of the model in the reports.
        ckpt_path: ``"last"`` goes on with an interrupted run.
        offload: keep the blocks of the denoiser in host memory, and only the one that runs on the device.
        trainer_options: for `lightning.pytorch.Trainer`.

    Returns:
        The pipeline, its denoiser quantized, also in ``run_dir/quantized``.

    Raises:
        ValueError: if `run_dir` holds another, a finished or (without `ckpt_path`) an unfinished run.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise ValueError(f"quantize takes a diffusers pipeline, got {type(pipeline).__name__}: load it first")
    recipe = recipe or Recipe()
    data = data or CalibrationDataModule()
    sampler = sampler or SamplerConfig()
    name = base_model or getattr(pipeline, "name_or_path", None) or type(pipeline).__name__
    evaluation = evaluation or EvaluationConfig(n_images=0)
    Evaluator(evaluation, sampler).check()
    run = open_run(run_dir, pipeline, name, recipe, data, sampler)
    if (state := run.state()) is RunState.FINISHED:
        raise ValueError(f"{run.path} holds this run, finished: use load_quantized({str(run.quantized)!r})")
    if state is RunState.UNFINISHED and ckpt_path is None:
        raise ValueError(f"{run.path} holds this run, unfinished: pass ckpt_path='last' to go on with it")
    options = {**TRAINER_DEFAULTS, "logger": TensorBoardLogger(run.path, name="", version="logs"), **trainer_options}
    callbacks = run_callbacks(run, name, evaluation, sampler, checkpoint_steps=2500)
    if options.get("enable_progress_bar", True):
        callbacks.insert(0, CalibrationProgress())  # its bar ends before the next one begins
    options["callbacks"] = [*options.get("callbacks", []), *callbacks]
    module, trainer = BlockReconstruction(pipeline, recipe, offload), pl.Trainer(**options)
    check_processes(trainer, recipe, data, evaluation)
    print_estimate(trainer, module, data, sampler, evaluation)
    fit(trainer, module, data, run, sampler, ckpt_path)
    return pipeline


def check_processes(
    trainer: pl.Trainer, recipe: Recipe, data: CalibrationDataModule, evaluation: EvaluationConfig
) -> None:
    """Finds what cannot be shared out before processes are started.

    Raises:
        ValueError: if there are more processes than samples in a batch, or than images.
    """
    Shard(min(recipe.rounding.batch_size, data.n_train_of(data.n_samples)), 0, trainer.world_size)
    check_images(evaluation.n_images, trainer.world_size, "--evaluation.n_images")
    prepare_strategy(trainer)


def check_images(n: int, world_size: int, option: str) -> None:
    """Finds out that some process would get no images.

    Raises:
        ValueError: if so.
    """
    if 0 < n < world_size:
        raise ValueError(f"{option} {n} is less than the {world_size} processes: raise it or take fewer devices")


def print_estimate(
    trainer: pl.Trainer,
    module: BlockReconstruction,
    data: CalibrationDataModule,
    sampler: SamplerConfig,
    evaluation: EvaluationConfig,
) -> None:
    """Says what the run will take, on the first process; a run is not to fail for want of an estimate."""
    if trainer.is_global_zero:
        device = trainer.strategy.root_device
        try:
            module.place(device)
            estimate = estimate_run(
                module.pipeline, module.recipe, data, sampler, evaluation, device, trainer.world_size
            )
            print("\n".join(estimate.lines()), flush=True)
        except Exception as error:  # whatever the model or its scheduler may raise
            print(f"no estimate ({' '.join(str(error).split())[:150]})", flush=True)


def fit(
    trainer: pl.Trainer,
    module: BlockReconstruction,
    data: CalibrationDataModule,
    run: RunDirectory,
    sampler: SamplerConfig,
    ckpt_path: str | None,
) -> None:
    """Runs a calibration in its run directory."""
    checkpoint = None
    if ckpt_path == "last":
        checkpoint = run.newest_checkpoint()
        if checkpoint is None:
            rank_zero_only(print)(f"{run.path} has no checkpoint yet: starting from the beginning")
    elif ckpt_path is not None:
        checkpoint = Path(ckpt_path)
        if not checkpoint.is_file():
            raise FileNotFoundError(f"there is no checkpoint {ckpt_path}: give last, or a file")
        run.check_checkpoint(checkpoint)
    module.made_from = run.parts
    data = copy.copy(data)  # the caller's may serve another run
    decisive = ("n_samples", "seed", "source", "image_column", "timesteps", "weighting", "sampler")
    data.made_from = {name: run.parts["calibration"][name] for name in decisive}
    data.made_from["model"] = run.parts["model"]["weights"]
    data.sampler = sampler
    data.directory = data.directory or str(run.path / "calibration")
    data.store_directory = data.store_directory or str(run.activations)
    with run.working() if trainer.is_global_zero else nullcontext(), together(trainer):
        trainer.fit(module, data, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
    if not module.finished:
        raise ValueError(
            f"{run.path}: stopped before unit {module.position + 1} of {len(module.units)} was done; go on with "
            "--ckpt_path last (ckpt_path='last')"
        )
    module.use_learned()
    module.release()
