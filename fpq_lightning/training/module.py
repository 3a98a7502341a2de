"""The LightningModule: block-wise learned rounding, one unit of a network an epoch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any, cast

import lightning.pytorch as pl
import torch
from diffusers import DiffusionPipeline
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from fpq_lightning.calibration.replay import NetworkReplay
from fpq_lightning.calibration.store import parse_bytes
from fpq_lightning.diffusion.components import check_components, quantize_components
from fpq_lightning.diffusion.denoisers import as_one
from fpq_lightning.graph.attention import quantize_attention
from fpq_lightning.graph.units import Unit
from fpq_lightning.nn.calibrated import LayerQuantization, QuantizedModule, quantized_modules
from fpq_lightning.nn.convert import make_quantized
from fpq_lightning.nn.coverage import coverage
from fpq_lightning.quantization.quantizer import without_groups
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.reconstruction.report import UnitReport
from fpq_lightning.reconstruction.unit import UnitTrainer, advance
from fpq_lightning.training.calibration_callback import CalibrationCallback
from fpq_lightning.training.datamodule import CalibrationDataModule
from fpq_lightning.training.denoisers import Denoiser, make_denoisers
from fpq_lightning.training.placement import Placement
from fpq_lightning.training.plan import Plan
from fpq_lightning.training.strategy import check_trainer
from fpq_lightning.training.units import Found, find_units
from fpq_lightning.utils import distributed

logger = logging.getLogger(__name__)


class BlockReconstruction(pl.LightningModule):
    """Quantizes the denoisers of a pipeline, one after the other, a unit an epoch, in execution order.

    At the start of an epoch a unit is captured (its inputs on the quantized path, its full-precision outputs) and its
    formats and clips are searched. The training steps learn its rounding. Validation hardens it and measures its error
    on held-out samples. At the end the better of learned and nearest rounding is kept, and both paths move on.

    Args:
        pipeline: a diffusers pipeline in full precision.
        recipe: what to quantize to.
        data: the calibration set; it serves this module's units from now on.
        offload: keep the blocks of the denoisers in host memory, and only the one that runs on the device.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, recipe: Recipe, data: CalibrationDataModule, offload: bool = False
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # many steps a batch: a step is shorter than Lightning's way around it
        self.strict_loading = False
        self.pipeline = pipeline
        self.recipe = recipe
        self.data = data
        self.denoisers = make_denoisers(pipeline, recipe)
        self.units: list[Unit] = []  # of all denoisers
        self.reports: list[UnitReport] = []
        self.plan = Plan()
        self.made_from: dict[str, Any] = {}  # what decides the result, kept in checkpoints
        self.unit_trainer: UnitTrainer | None = None  # the unit in work, once its epoch has started
        self._replay: NetworkReplay | None = None
        self._resumed: dict[str, Any] = {}  # variables and optimiser of the unit that a checkpoint left off in
        self._held_out_error: float | None = None
        check_components(pipeline, recipe)
        networks = {denoiser.name: denoiser.network for denoiser in self.denoisers}
        blocks = {d.name: [unit.module for unit in d.candidates] for d in self.denoisers} if offload else None
        # While it runs as a whole there are no activations.
        self.placement = Placement(pipeline, networks, blocks, kept=parse_bytes(data.store_budget))
        data.attach(self.placement, recipe.rounding.batch_size, self.plan, required=recipe.denoisers is not None)

    @property
    def denoiser(self) -> nn.Module:
        """All that is quantized, `as_one`. It is no submodule, which Lightning would move to the device as a whole."""
        return as_one({denoiser.name: denoiser.network for denoiser in self.denoisers})

    # --- optimisation ------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Adam over the rounding variables and scales of the unit in work; none before and after it is learned."""
        if self.unit_trainer is None or self.unit_trainer.backward is None:
            return []
        rounding = self.recipe.rounding
        return self.unit_trainer.adam(rounding.learning_rate, rounding.scale_learning_rate)

    def on_train_start(self) -> None:
        """Goes on with a unit in the middle; Lightning starts no epoch anew that it resumes."""
        self._check_same_start()
        if self.plan.step:
            self._begin_unit()

    def on_train_epoch_start(self) -> None:
        """Begins a unit: captures what it sees, searches its formats, makes its variables and their optimiser."""
        if self.unit_trainer is None and not self.plan.finished:
            self._begin_unit()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        """Optimisation steps of the unit, one for each row of sample indices in `batch`.

        Returns:
            The loss of the last step: the error of the unit's output in units of that of nearest rounding, plus the
            regulariser that drives the rounding variables to 0 or 1.
        """
        if self.unit_trainer is None or self.plan.unit_is_learned:
            return None
        optimizer = cast(LightningOptimizer, self.optimizers())
        # Lightning counts one step a batch.
        losses = self.unit_trainer.train(batch, self.plan.step, optimizer.optimizer, last_step=optimizer.step)
        self.plan.step += len(batch)
        reconstruction_loss, rounding_loss = losses.unbind()
        loss = reconstruction_loss + rounding_loss
        self.log_dict({"loss": loss, "reconstruction_loss": reconstruction_loss, "rounding_loss": rounding_loss})
        return loss

    def on_validation_start(self) -> None:
        """Hardens what was learned; before that its optimiser goes, and with it the memory of its CUDA graph."""
        if self.unit_trainer is not None:
            self.unit_trainer.stop_learning()
            self._renew_optimizer()
            self.unit_trainer.harden()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Measures the error of the quantized unit's output on held-out samples, relative to the output's energy."""
        if self.unit_trainer is not None and self.unit_trainer.layers:
            self._held_out_error = self.unit_trainer.held_out_error("quantized")
            self.log("held_out_error", self._held_out_error, batch_size=1)

    def on_train_epoch_end(self) -> None:
        """Ends the unit: keeps the better rounding, corrects the bias, moves both paths on."""
        if self.unit_trainer is not None:
            self._end_unit()
        if self.plan.finished:
            self.trainer.should_stop = True

    # --- units -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Traces the units and makes their layers quantized classes."""
        check_trainer(self.trainer)
        device = self.trainer.strategy.root_device
        self.placement.to(device)
        if self.units:
            return
        self.denoisers = [denoiser for denoiser in self.denoisers if denoiser.name in self.data.sets]
        for denoiser in self.denoisers:
            denoiser.prefix = f"{denoiser.name}." if len(self.denoisers) > 1 else ""
            denoiser.start = len(self.units)
            self._find_units(denoiser, device)
            self.units += denoiser.units
        quantize_components(self.pipeline, self.recipe)
        learns = self.recipe.rounding.learned and bool(self.recipe.weight_formats())
        iterations = self.recipe.rounding.iterations if learns else 0
        self.plan.steps = [iterations if unit.layers else 0 for unit in self.units]

    def _trace(self, denoiser: Denoiser, device: torch.device) -> Found:
        return find_units(denoiser.network, denoiser.candidates, self.data.sets[denoiser.name], device)

    def _find_units(self, denoiser: Denoiser, device: torch.device) -> None:
        """Traces the units of a denoiser and makes their layers quantized classes."""
        recipe, calibration = denoiser.recipe, self.data.sets[denoiser.name]
        denoiser.units, splits, left_out = self._trace(denoiser, device)
        self._say_coverage(denoiser, left_out)
        granularity, unfit = recipe.granularity(), []
        for unit in denoiser.units:
            for name, layer in unit.layers.items():
                quantized = make_quantized(layer, granularity, splits.get(name) if recipe.split_skips else None)
                quantized.granularity = granularity.fitting(quantized.weight_parts())
                unfit += [denoiser.full(name)] if quantized.granularity != granularity else []
            self.reports.append(UnitReport(denoiser.full(unit.name), unit.parameters))
        if unfit and recipe.weight_formats():
            warnings.warn(without_groups(granularity, unfit), stacklevel=2)
        if recipe.attention.formats is not None:
            inputs = calibration.batch(slice(0, 1), device)
            left = quantize_attention(denoiser.network, denoiser.units, inputs, recipe.include, recipe.exclude)
            if left:
                names = ", ".join(map(denoiser.full, left))
                warnings.warn(f"attention that is left in full precision: {names}", stacklevel=2)

    def _say_coverage(self, denoiser: Denoiser, left_out: Mapping[str, str]) -> None:
        """Says how much is going to be quantized, and warns of what one would expect to be and is not."""
        layers = {name for unit in denoiser.units for name in unit.layers}
        found = coverage(denoiser.network, layers if self.recipe.weight_formats() else (), left_out)
        denoiser.coverage, of = found, f"{denoiser.name}: " if denoiser.prefix else ""
        if self.trainer.is_global_zero:
            for line in found.lines():
                logger.info("%s%s", of, line)
        if left := [str(kept) for kept in found.kept if not kept.expected]:
            warnings.warn(f"{of}left in full precision: {', '.join(left)}", stacklevel=4)
        if not layers:
            raise ValueError(f"{of}no layer can be quantized: {found.kept_phrase}")

    @property
    def denoiser_in_work(self) -> Denoiser:
        """The denoiser that holds the unit in work."""
        return self._denoiser_of(self.plan.unit)

    def _denoiser_of(self, number: int) -> Denoiser:
        return next(denoiser for denoiser in reversed(self.denoisers) if denoiser.start <= number)

    def _begin_unit(self) -> None:
        replay, recipe = self._replay_at_unit(), self.denoiser_in_work.recipe
        self.unit_trainer = UnitTrainer(replay, self.data.samples(), recipe, self.reports[self.plan.unit])
        self.unit_trainer.begin(learns=self.plan.unit_steps > 0, state=self._resumed.get("variables"))
        self._renew_optimizer()
        if self._resumed:
            self.trainer.strategy.load_optimizer_state_dict(self._resumed)
            self._resumed = {}

    def _replay_at_unit(self) -> NetworkReplay:
        """The replay at the unit in work; brings both paths there after a resume."""
        denoiser = self.denoiser_in_work
        if self._replay is None:
            store = self.data.make_store(self.device)
            self._replay = NetworkReplay(
                denoiser.network, denoiser.units, self.data.local_set(denoiser.name), store, self.data.micro_batch,
                self.recipe.quantized_inputs, self.recipe.solves,
            )  # fmt: skip
        while self._replay.position < self.plan.unit - denoiser.start:
            self.placement.calibrate(self._replay.unit, denoiser.name)
            advance(self._replay)
        self.placement.calibrate(self._replay.unit, denoiser.name)
        return self._replay

    def _renew_optimizer(self) -> None:
        """Gives Lightning the optimiser of `configure_optimizers`, since every unit has variables of its own."""
        self.trainer.strategy.setup_optimizers(self.trainer)

    def _end_unit(self) -> None:
        unit, replay = cast(UnitTrainer, self.unit_trainer), cast(NetworkReplay, self._replay)
        unit.end(self._held_out_error, self.plan.step)
        self.unit_trainer = self._held_out_error = None
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, CalibrationCallback):
                callback.on_unit_end(self.trainer, self, unit.report)
        self.plan.next_unit()
        if replay.position == len(replay.units):
            replay.store.close()
            self._replay = None
        if self.plan.finished:
            self.placement.calibrate(None, None)

    def use_quantized(self) -> None:
        """Leaves the pipeline running its quantization."""
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module):
                for module in quantized_modules(component).values():
                    module.set_mode("quantized")

    # --- checks ------------------------------------------------------------------------------------------------

    def _check_same_start(self) -> None:
        """Finds processes that start from different files.

        Raises:
            ValueError: if there are any.
        """
        weights = [found.weights.sum().item() for found in self.data.sets.values()]
        here = (self.plan.unit, self.plan.step, *weights)
        if len(set(distributed.all_gather_objects(here))) > 1:
            raise ValueError(
                "the processes do not start from the same checkpoint and calibration set: give --run_dir a place on a "
                "file system that they share"
            )

    # --- state -------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Empty: checkpoints hold the quantization (see `on_save_checkpoint`), never the model."""
        return {}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Nothing to load."""
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def _modules_of(self, number: int) -> dict[str, QuantizedModule]:
        """Layers and attention of a unit, by their full names."""
        denoiser, unit = self._denoiser_of(number), self.units[number]
        modules = cast(dict[str, QuantizedModule], {**unit.layers, **unit.attention})
        return {denoiser.full(name): module for name, module in modules.items()}

    def unit_state(self, number: int) -> dict[str, Any]:
        """The quantization of a unit's layers, plain types and tensors: of each the variants that are not learned."""
        found = {}
        for name, module in self._modules_of(number).items():
            variants = cast(dict[str, LayerQuantization], module.variants)
            found[name] = {mode: q.to_state() for mode, q in variants.items() if mode == "nearest" or not q.roundings}
        return found

    def load_unit_state(self, number: int, state: Mapping[str, Any]) -> None:
        """Restores what `unit_state` gave."""
        for name, module in self._modules_of(number).items():
            for mode, variant in state.get(name, {}).items():
                device = next(chain(module.parameters(), self.denoiser.parameters())).device
                module.variants[mode] = LayerQuantization.from_state(variant, device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the quantization and variables of the unit in work; `RunCheckpoint` adds the finished ones."""
        if self.unit_trainer is not None:
            self.unit_trainer.lap()
        checkpoint["fpq"] = {
            "made_from": self.made_from,
            "unit": self.plan.unit,
            "step": self.plan.step,
            "layers": {} if self.plan.finished else self.unit_state(self.plan.unit),
            "variables": None if self.unit_trainer is None else self.unit_trainer.learning_state(),
            "reports": [asdict(r) for r in self.reports],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what `on_save_checkpoint` wrote."""
        state = checkpoint["fpq"]
        self.plan.unit, self.plan.step = state["unit"], state["step"]
        self.reports = [UnitReport(**r) for r in state["reports"]]
        if state["variables"] is not None:
            self._resumed = {"variables": state["variables"], "optimizer_states": checkpoint["optimizer_states"]}
        if not self.plan.finished:
            self.load_unit_state(self.plan.unit, state["layers"])
