"""The dress rehearsal: a whole run on a few samples before the real one, which leaves nothing behind.

Two short trajectories are recorded and the network is traced as in the run. Both paths go through all units, but one
block alone is searched, learned for a step and quantized. Then everything that follows a calibration is done: the
pipeline is written and opened again, images are sampled and judged, the report is written.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from diffusers import DiffusionPipeline
from lightning.pytorch.utilities.seed import isolate_rng
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fpq_lightning.diffusion.pipelines import class_to_open, move_pipeline, take_settings
from fpq_lightning.diffusion.sampling import SamplerConfig, generate, running_pipeline, shortened, using_sampler
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.graph.units import Unit
from fpq_lightning.nn.calibrated import quantized_modules
from fpq_lightning.nn.swap import restore
from fpq_lightning.storage.pipeline import check_form, load_quantized
from fpq_lightning.training.callbacks.finalize import FinalizeQuantization
from fpq_lightning.training.callbacks.image_quality import ImageQuality
from fpq_lightning.training.callbacks.report import RunReport
from fpq_lightning.training.datamodule import CalibrationDataModule
from fpq_lightning.training.denoisers import Denoiser
from fpq_lightning.training.module import BlockReconstruction
from fpq_lightning.training.run_directory import RunDirectory
from fpq_lightning.training.strategy import TRAINER_DEFAULTS
from fpq_lightning.training.units import Found
from fpq_lightning.utils.progress import quiet
from fpq_lightning.utils.side_work import LeftOut
from fpq_lightning.utils.tracebacks import RehearsalError

logger = logging.getLogger(__name__)

_SAMPLES = 4  # two trajectories of two steps
_IMAGES = 2
_REAL_IMAGES = 64
_SECONDS, _SHARE = 60.0, 0.03  # what it may take: so much, or that share of the run
_WRITTEN = 4 * 2**30  # bytes of a pipeline; one that is larger takes long to write and to open


def rehearse(
    module: BlockReconstruction,
    data: CalibrationDataModule,
    sampler: SamplerConfig,
    evaluation: EvaluationConfig,
    directory: RunDirectory,
    trainer: pl.Trainer,
    seconds: float,
) -> None:
    """Rehearses a run in this process.

    Args:
        module: of the run.
        data: of the run.
        sampler: of the run.
        evaluation: of the run.
        directory: of the run.
        trainer: of the run.
        seconds: that the run is expected to take.

    Raises:
        ValueError: if a stage fails; it says which and why.
    """
    start = time.perf_counter()
    with directory.rehearsing() as scratch, quiet() as said, isolate_rng(), _undone(module.pipeline):
        allowed = max(_SECONDS, _SHARE * seconds)
        small = _SmallRun(module, data, sampler, evaluation, scratch, start + allowed, allowed / max(seconds, allowed))
        with _naming(small):
            _trainer_like(trainer).fit(small, small.data)
    for warning in said:
        if issubclass(warning.category, LeftOut):
            warnings.warn(f"rehearsal: {warning.message}", LeftOut, stacklevel=2)
    for line in small.found:
        warnings.warn(f"rehearsal: {line}", stacklevel=2)
    left = f"; left out, for it took too long: {', '.join(small.left)}" if small.left else ""
    logger.info("rehearsed in %.1f s: %s%s", time.perf_counter() - start, ", ".join(small.done), left)


def _trainer_like(trainer: pl.Trainer) -> pl.Trainer:
    """A trainer of one process on the device of another."""
    device = trainer.strategy.root_device
    return pl.Trainer(
        **TRAINER_DEFAULTS
        | {
            "accelerator": device.type,
            "devices": 1 if device.index is None else [device.index],
            "precision": trainer.precision,
            "logger": False,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
        }
    )


@contextmanager
def _naming(small: _SmallRun) -> Iterator[None]:
    """Says of an error in which stage it was raised; advice on full memory or a full disk is given as in a run."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model, a metric or a report may raise
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        reason = " ".join(str(error).split())
        if isinstance(error, (ValueError, FileNotFoundError)):
            raise ValueError(f"rehearsal: {small.done[-1]} failed: {reason}") from error
        raise RehearsalError(f"rehearsal: {small.done[-1]} failed: {type(error).__name__}: {reason[:300]}") from error


@contextmanager
def _undone(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Turns what became quantized within the block back into what it was."""

    def found() -> list[nn.Module]:
        components = [c for c in pipeline.components.values() if isinstance(c, nn.Module)]
        return [m for component in components for m in quantized_modules(component).values()]

    before = set(found())
    try:
        yield
    finally:
        for layer in found():
            if layer not in before:
                restore(layer)


class _SmallRun(BlockReconstruction):
    """The calibration of one unit and, at its end, what follows that of all.

    Args:
        module: of the run.
        data: of the run.
        sampler: of the run.
        evaluation: of the run.
        scratch: where files go.
        deadline: of `time.perf_counter`; what follows the calibration of the unit does not begin after it.
        share: of the weights that there is time to quantize.

    Attributes:
        done: the stages that were begun, in words; the last one is at work.
        left: those that there was no time for.
        found: what is to be warned of.
    """

    def __init__(
        self,
        module: BlockReconstruction,
        data: CalibrationDataModule,
        sampler: SamplerConfig,
        evaluation: EvaluationConfig,
        scratch: RunDirectory,
        deadline: float,
        share: float,
    ) -> None:
        networks = [c for c in module.pipeline.components.values() if isinstance(c, nn.Module)]
        size = sum(x.numel() * x.element_size() for network in networks for x in network.parameters())
        self._is_written = size <= _WRITTEN
        recipe = replace(module.recipe, rounding=replace(module.recipe.rounding, iterations=1))
        if not self._is_written:  # the search of all weights of a text encoder takes as long
            recipe = replace(recipe, components={})
        few = copy.copy(data)
        few.n_samples, few.held_out_fraction = _SAMPLES, 1 / _SAMPLES
        few.sampler = shortened(module.pipeline, sampler, batch_size=min(_IMAGES, sampler.batch_size))
        few.directory, few.store_directory, few.key = str(scratch.path / "calibration"), str(scratch.activations), None
        super().__init__(module.pipeline, recipe, few)
        self.placement = few.placement = module.placement
        self.done, self.left, self.found = ["sampling two short trajectories"], list[str](), list[str]()
        self._scratch, self._deadline, self._share = scratch, deadline, share
        self._finalize = FinalizeQuantization(scratch, scratch.parts["model"]["name"])
        n_real = None if evaluation.real_images is None else min(evaluation.n_real or _REAL_IMAGES, _REAL_IMAGES)
        self._evaluation = replace(evaluation, n_images=min(_IMAGES, evaluation.n_images), n_real=n_real, images=None)

    def setup(self, stage: str) -> None:
        self.done.append("tracing the network")
        super().setup(stage)

    def _trace(self, denoiser: Denoiser, device: torch.device) -> Found:
        found = super()._trace(denoiser, device)
        chosen = _cheapest([unit for unit in found.units if unit.layers], self._share)
        for unit in found.units:
            if unit is not chosen:
                unit.layers = {}
        return found

    def _begin_unit(self) -> None:
        unit = self.units[self.plan.unit]
        if unit.layers:
            self.done.append(f"quantizing {unit.name}")
        super()._begin_unit()

    def on_train_end(self) -> None:
        quality = ImageQuality(self._evaluation, self.data.sampler, self._scratch)
        report = RunReport(self._scratch, quality)
        stages: dict[str, Any] = {
            "writing the quantized model": lambda: self._finalize.on_train_end(self.trainer, self),
            "opening the written model": self._open,
        }
        if not self._is_written:
            stages = {"opening the quantized model": self._open_without_weights}
        if self._evaluation.n_images:
            stages["sampling and judging images"] = lambda: quality.on_train_end(self.trainer, self)
        stages["writing the report"] = lambda: report.on_train_end(self.trainer, self)
        for stage, work in stages.items():
            if time.perf_counter() > self._deadline:
                self.left.append(stage)
            else:
                self.done.append(stage)
                work()

    def _open(self) -> None:
        opened = load_quantized(self._scratch.quantized, class_to_open(self.pipeline))
        opened.set_progress_bar_config(disable=True)
        take_settings(opened, self.pipeline)
        move_pipeline(opened, self.device)
        self.placement.to(self.device)
        with running_pipeline(self.pipeline, "quantized"):
            expected = self._generated(self.pipeline)
        given = self._generated(opened)
        is_exact = self.device.type == "cpu" and all(x.dtype == torch.float32 for x in self.denoiser.parameters())
        if is_exact and not (len(given) == len(expected) and all(map(torch.equal, given, expected))):
            self.found.append("the written model does not give the very images of the calibrated one when opened")

    def _open_without_weights(self) -> None:
        check_form(
            self.pipeline, self._scratch.path / "form", self._finalize.details(self), self._finalize.of_each(self)
        )

    def _generated(self, pipeline: DiffusionPipeline) -> list[Tensor]:
        """What a pipeline makes of one seed."""
        with using_sampler(pipeline, self.data.sampler):
            leaves = tree_leaves(generate(pipeline, self.data.sampler, [self._evaluation.seed]))
        arrays = [x for x in leaves if isinstance(x, (Tensor, np.ndarray, Image))]
        return [x.cpu() if isinstance(x, Tensor) else torch.from_numpy(np.array(x)) for x in arrays]


def _cheapest(units: list[Unit], share: float) -> Unit | None:
    """The smallest block, as it shows the most; the smallest lone layer if no block is a small enough share of all."""
    most = share * sum(unit.parameters for unit in units)
    blocks = [unit for unit in units if len(unit.layers) > 1 and unit.parameters <= most]
    return min(blocks or units, key=lambda unit: unit.parameters, default=None)
