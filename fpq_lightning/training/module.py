"""The LightningModule: block-wise learned rounding, one unit of the network an epoch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any, cast

import lightning.pytorch as pl
import torch
from diffusers import DiffusionPipeline
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from fpq_lightning.calibration.replay import NetworkReplay
from fpq_lightning.diffusion.components import check_components, quantize_components
from fpq_lightning.diffusion.pipelines import denoiser_name, warn_of_further_denoisers
from fpq_lightning.graph.attention import quantize_attention
from fpq_lightning.graph.units import Unit, discover_units, select_layers
from fpq_lightning.nn.calibrated import LayerQuantization, QuantizedModule, quantized_modules
from fpq_lightning.nn.convert import make_quantized
from fpq_lightning.nn.coverage import Coverage, coverage
from fpq_lightning.quantization.quantizer import layers_without_groups, without_groups
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.reconstruction.report import UnitReport
from fpq_lightning.reconstruction.unit import UnitTrainer, advance
from fpq_lightning.training.calibration_callback import CalibrationCallback
from fpq_lightning.training.datamodule import CalibrationDataModule
from fpq_lightning.training.placement import Placement
from fpq_lightning.training.plan import Plan
from fpq_lightning.training.units import Found, find_units
from fpq_lightning.utils import distributed

logger = logging.getLogger(__name__)


class BlockReconstruction(pl.LightningModule):
    """Quantizes the denoiser of a pipeline, a unit an epoch, in execution order.

    At the start of an epoch a unit is captured (its inputs on the quantized path, its full-precision outputs) and its
    formats and clips are searched. The training steps learn its rounding. Validation hardens it and measures its error
    on held-out samples. At the end the better of learned and nearest rounding is kept, and both paths move on.

    Args:
        pipeline: a diffusers pipeline in full precision.
        recipe: what to quantize to.
        data: the calibration set; it serves this module's units from now on.
        offload: keep the blocks of the denoiser in host memory, and only the one that runs on the device.
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
        self.units: list[Unit] = []
        self.reports: list[UnitReport] = []
        self.plan = Plan()
        self.made_from: dict[str, Any] = {}  # what decides the result, kept in checkpoints
        self.coverage = Coverage(0, 0, [])  # known once the units are
        self.unit_trainer: UnitTrainer | None = None  # the unit in work, once its epoch has started
        self._replay: NetworkReplay | None = None
        self._resumed: dict[str, Any] = {}  # variables and optimiser of the unit that a checkpoint left off in
        self._held_out_error: float | None = None
        denoiser = getattr(pipeline, denoiser_name(pipeline)).eval().requires_grad_(False)
        self._found = discover_units(denoiser, recipe.include, recipe.exclude, recipe.units == "layer")
        self._check_layers(denoiser)
        check_components(pipeline, recipe)
        warn_of_further_denoisers(pipeline)
        self.placement = Placement(pipeline, [unit.module for unit in self._found] if offload else None)
        data.attach(self.placement, recipe.rounding.batch_size, self.plan)

    @property
    def denoiser(self) -> nn.Module:
        """The network that is quantized. It is no submodule, which Lightning would move to the device as a whole."""
        return self.placement.denoiser

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
        self._check_trainer()
        device = self.trainer.strategy.root_device
        self.placement.to(device)
        if self.units:
            return
        self.units, splits, left_out = self._find_units(device)
        self._say_coverage(left_out)
        granularity, unfit = self.recipe.granularity(), []
        for unit in self.units:
            for name, layer in unit.layers.items():
                quantized = make_quantized(layer, granularity, splits.get(name) if self.recipe.split_skips else None)
                quantized.granularity = granularity.fitting(quantized.weight_parts())
                unfit += [name] if quantized.granularity != granularity else []
            self.reports.append(UnitReport(unit.name, unit.parameters))
        if unfit and self.recipe.weight_formats():
            warnings.warn(without_groups(granularity, unfit), stacklevel=2)
        quantize_components(self.pipeline, self.recipe)
        if self.recipe.attention.formats is not None:
            inputs = self.data.set.batch(slice(0, 1), device)
            left = quantize_attention(self.denoiser, self.units, inputs, self.recipe.include, self.recipe.exclude)
            if left:
                warnings.warn(f"attention that is left in full precision: {', '.join(left)}", stacklevel=2)
        learns = self.recipe.rounding.learned and bool(self.recipe.weight_formats())
        iterations = self.recipe.rounding.iterations if learns else 0
        self.plan.steps = [iterations if unit.layers else 0 for unit in self.units]

    def _find_units(self, device: torch.device) -> Found:
        return find_units(self.denoiser, self._found, self.data.set, device)

    def _say_coverage(self, left_out: Mapping[str, str]) -> None:
        """Says how much is going to be quantized, and warns of what one would expect to be and is not."""
        layers = {name for unit in self.units for name in unit.layers}
        self.coverage = coverage(self.denoiser, layers if self.recipe.weight_formats() else (), left_out)
        if self.trainer.is_global_zero:
            for line in self.coverage.lines():
                logger.info(line)
        if left := [str(kept) for kept in self.coverage.kept if not kept.expected]:
            warnings.warn(f"left in full precision: {', '.join(left)}", stacklevel=3)
        if not layers:
            raise ValueError(f"no layer can be quantized: {self.coverage.kept_phrase}")

    def _begin_unit(self) -> None:
        replay = self._replay_at_unit()
        self.unit_trainer = UnitTrainer(replay, self.data.samples(), self.recipe, self.reports[self.plan.unit])
        self.unit_trainer.begin(learns=self.plan.unit_steps > 0, state=self._resumed.get("variables"))
        self._renew_optimizer()
        if self._resumed:
            self.trainer.strategy.load_optimizer_state_dict(self._resumed)
            self._resumed = {}

    def _replay_at_unit(self) -> NetworkReplay:
        """The replay at the unit in work; brings both paths there after a resume."""
        if self._replay is None:
            store = self.data.make_store(self.device)
            self._replay = NetworkReplay(
                self.denoiser, self.units, self.data.local_set(), store, self.data.micro_batch,
                self.recipe.quantized_inputs, self.recipe.solves,
            )  # fmt: skip
        while self._replay.position < self.plan.unit:
            self.placement.calibrate(self._replay.unit)
            advance(self._replay)
        self.placement.calibrate(self._replay.unit)
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
        if self.plan.finished:
            replay.store.close()
            self._replay = None
            self.placement.calibrate(None)

    def use_quantized(self) -> None:
        """Leaves the pipeline running its quantization."""
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module):
                for module in quantized_modules(component).values():
                    module.set_mode("quantized")

    # --- checks ------------------------------------------------------------------------------------------------

    def _check_layers(self, denoiser: nn.Module) -> None:
        """Finds what cannot be quantized before minutes are spent on calibration data."""
        if adapted := next((name for name, m in denoiser.named_modules() if hasattr(m, "base_layer")), None):
            raise ValueError(
                f"{adapted} is a LoRA layer: make it part of the weights with pipeline.fuse_lora() and "
                "pipeline.unload_lora_weights() first"
            )
        weights = {n: cast(Tensor, m.weight) for unit in self._found for n, m in unit.layers.items()}
        if patterns := list(self.recipe.activations.token_layers):
            select_layers(list(weights), patterns, [])
        if self.recipe.weight_formats():
            layers_without_groups(self.recipe.granularity(), weights)  # an unfit group size is better found now
        for name, weight in weights.items():
            if not weight.detach().isfinite().all():
                raise ValueError(f"{name}: its weight holds NaN or Inf; repair the model or exclude the layer")

    def _check_trainer(self) -> None:
        """Refuses options of the trainer with which a unit would not be an epoch."""
        trainer = self.trainer
        if str(trainer.precision) not in ("32-true", "bf16-mixed"):
            raise ValueError(f"trainer.precision {trainer.precision} is not supported: use 32-true or bf16-mixed")
        wanted = {
            "limit_train_batches": 1.0,
            "limit_val_batches": 1.0,
            "val_check_interval": 1.0,
            "check_val_every_n_epoch": 1,
            "reload_dataloaders_every_n_epochs": 1,
        }
        for option, value in wanted.items():
            if getattr(trainer, option) != value:
                raise ValueError(f"trainer.{option} {getattr(trainer, option)} is not supported: leave it out")

    def _check_same_start(self) -> None:
        """Finds processes that start from different files.

        Raises:
            ValueError: if there are any.
        """
        here = (self.plan.unit, self.plan.step, self.data.set.weights.sum().item())
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

    def _known_modules(self) -> Iterator[tuple[str, QuantizedModule]]:
        """Layers and attention of the units that are finished or in work."""
        for unit in self.units[: self.plan.unit + 1]:
            yield from cast(dict[str, QuantizedModule], {**unit.layers, **unit.attention}).items()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the quantization of finished units and the variables of the one in work."""
        layers = {}
        for name, module in self._known_modules():
            variants = cast(dict[str, LayerQuantization], module.variants)
            layers[name] = {mode: q.to_state() for mode, q in variants.items() if mode == "nearest" or not q.roundings}
        if self.unit_trainer is not None:
            self.unit_trainer.lap()
        checkpoint["fpq"] = {
            "made_from": self.made_from,
            "unit": self.plan.unit,
            "step": self.plan.step,
            "layers": layers,
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
        for name, module in self._known_modules():
            for mode, variant in state["layers"].get(name, {}).items():
                device = next(chain(module.parameters(), self.denoiser.parameters())).device
                module.variants[mode] = LayerQuantization.from_state(variant, device)
