"""`quantize`: a calibration in one call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from fpq_lightning.diffusion.sampling import FunctionSampler, SamplerConfig
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.training.datamodule import CalibrationDataModule
from fpq_lightning.training.run import prepare_run
from fpq_lightning.training.strategy import TRAINER_DEFAULTS, precision_of

_ALONE = threading.RLock()  # a run uses random states, modes and warnings of the whole process


def quantize(
    pipeline: DiffusionPipeline,
    recipe: Recipe | None = None,
    run_dir: str | Path = "runs/quantize",
    data: CalibrationDataModule | None = None,
    sampler: SamplerConfig | Callable[[DiffusionPipeline, list[int]], Any] | None = None,
    evaluation: EvaluationConfig | None = None,
    base_model: str | Path | None = None,
    ckpt_path: str | Path | None = None,
    offload: bool = False,
    **trainer_options: Any,
) -> DiffusionPipeline:
    """Quantizes the denoisers of a pipeline in place; those of several threads one after the other.

    Args:
        pipeline: a diffusers pipeline in full precision.
        recipe: what to quantize to; FP4 weights and FP8 activations by default.
        run_dir: where checkpoints, the quantized pipeline and the reports go.
        data: the calibration set; sampled along the pipeline's own trajectories by default.
        sampler: how images are sampled, for calibration and evaluation; or a function that takes the pipeline and
            seeds, calls the pipeline and gives its images (`FunctionSampler`).
        evaluation: what image quality is measured on; left out by default.
        base_model: name of the model in the reports.
        ckpt_path: ``"last"`` goes on with an interrupted run.
        offload: keep the blocks of the denoisers in host memory, and only the one that runs on the device.
        trainer_options: of `lightning.pytorch.Trainer`, such as ``accelerator="cpu"``.

    Returns:
        The pipeline, its denoisers quantized, also in ``run_dir/quantized``.

    Raises:
        ValueError: if `run_dir` holds another, a finished or (without `ckpt_path`) an unfinished run.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise ValueError(f"quantize takes a diffusers pipeline, got {type(pipeline).__name__}: load it first")
    if sampler is not None and not isinstance(sampler, SamplerConfig):
        sampler = FunctionSampler(function=sampler)
    with _ALONE:
        run = prepare_run(
            pipeline,
            str(base_model or getattr(pipeline, "name_or_path", None) or type(pipeline).__name__),
            recipe or Recipe(),
            data or CalibrationDataModule(),
            sampler or SamplerConfig(),
            evaluation or EvaluationConfig(n_images=0),
            run_dir,
            resume=ckpt_path is not None,
            offload=offload,
            precision=precision_of(trainer_options),
        )
        trainer = run.trainer(**{**TRAINER_DEFAULTS, **trainer_options})
        run.log_estimate(trainer)
        run.fit(trainer, ckpt_path)
    return pipeline
