"""The LightningModule: block-wise learned rounding, one unit of the network an epoch."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import chain
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch
from diffusers import DiffusionPipeline
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from fpq_lightning.calibration.replay import NetworkReplay
from fpq_lightning.diffusion.pipelines import denoiser_name
from fpq_lightning.graph.attention import quantize_attention
from fpq_lightning.graph.chain import parts_of
from fpq_lightning.graph.offload import Offload
from fpq_lightning.graph.trace import trace_units
from fpq_lightning.graph.units import Unit, discover_units, select_layers
from fpq_lightning.nn.calibrated import LayerQuantization, QuantizedModule, make_quantized, quantized_modules
from fpq_lightning.nn.components import check_components, quantize_components
from fpq_lightning.quantization.quantizer import layers_without_groups, without_groups
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.quantization.rounding import beta_schedule
from fpq_lightning.reconstruction.backward import Backward
from fpq_lightning.reconstruction.optimizer import GraphedAdam
from fpq_lightning.reconstruction.out_of_memory import gradients, within_memory
from fpq_lightning.reconstruction.unit import UnitReconstruction, UnitReport
from fpq_lightning.training.datamodule import CalibrationDataModule
from fpq_lightning.utils import distributed

T = TypeVar("T")

warnings.filterwarnings("ignore", message=".*`LightningModule.configure_optimizers` returned `None`.*")


class BlockReconstruction(pl.LightningModule):
    """Quantizes the denoiser of a pipeline, a unit an epoch, in execution order.

    A unit is captured (its inputs on the quantized path, its full-precision outputs), its formats and clips are
    searched, its rounding is learned for the epoch, hardened, and compared with nearest rounding on held-out
    samples; then both paths move on through it.

    Args:
        pipeline: a diffusers pipeline in full precision.
        recipe: what to quantize to.
        offload: keep the blocks of the denoiser in host memory, and only the one that runs on the device.
    """

    def __init__(self, pipeline: DiffusionPipeline, recipe: Recipe, offload: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False  # many steps a batch: a step is shorter than Lightning's way around it
        self.pipeline = pipeline
        self.recipe = recipe
        # No submodule, which Lightning would move to the device as a whole.
        self._denoiser = (getattr(pipeline, denoiser_name(pipeline)).eval().requires_grad_(False),)
        self.strict_loading = False
        self._plan = discover_units(self.denoiser, recipe.include, recipe.exclude, recipe.units == "layer")
        self._check_weights()
        check_components(pipeline, recipe)
        self._offload = Offload(self.denoiser, [unit.module for unit in self._plan]) if offload else None
        self.units: list[Unit] = []
        self.reports: list[UnitReport] = []
        self.made_from: dict[str, Any] = {}  # what decides the result, kept in checkpoints
        self.position = 0  # the unit in work
        self.iteration = 0  # its optimisation steps done
        self._entered = -1  # the unit whose activations are captured and variables made
        self._replay: NetworkReplay | None = None
        self._unit: UnitReconstruction | None = None
        self._learning_state: dict[str, Any] | None = None
        self._clock = time.perf_counter()

    # --- structure ---------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> nn.Module:
        """The network that is quantized."""
        return self._denoiser[0]

    def place(self, device: torch.device) -> None:
        """Makes the pipeline ready to run on a device."""
        if self._offload is None:
            self.pipeline.to(device)
            return
        self._offload.place(device)
        self._move_other_components(device)

    def release(self) -> None:
        """Leaves the pipeline as any other; one whose blocks were offloaded, in host memory."""
        if self._offload is not None:
            self._offload.remove()
            self._offload = None
            self.pipeline.to("cpu")

    def _move_other_components(self, device: torch.device) -> None:
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module) and component is not self.denoiser:
                component.to(device)

    @property
    def calibration(self) -> CalibrationDataModule:
        """The trainer's datamodule."""
        return cast(CalibrationDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]

    @property
    def finished(self) -> bool:
        """Whether every unit is quantized."""
        return bool(self.units) and self.position >= len(self.units)

    def setup(self, stage: str) -> None:
        """Finds the units and makes their layers quantized classes."""
        if str(self.trainer.precision) not in ("32-true", "bf16-mixed"):
            raise ValueError(f"trainer.precision {self.trainer.precision} is not supported: use 32-true or bf16-mixed")
        device = self.trainer.strategy.root_device
        self.place(device)
        if self.units:
            return
        first = self.calibration.set.batch(slice(0, 1), device)
        planned = [name for unit in self._plan for name in unit.layers]
        self.units, splits = trace_units(self.denoiser, self._plan, first)
        ran = {name for unit in self.units for name in unit.layers}
        if skipped := [name for name in planned if name not in ran]:
            warnings.warn(f"not called by the denoiser, so left in full precision: {', '.join(skipped)}", stacklevel=2)
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
            left = quantize_attention(self.denoiser, self.units, first, self.recipe.include, self.recipe.exclude)
            if left:
                warnings.warn(f"attention that is left in full precision: {', '.join(left)}", stacklevel=2)

    def _check_weights(self) -> None:
        """Finds what cannot be quantized before minutes are spent on calibration data."""
        if adapted := next((name for name, m in self.denoiser.named_modules() if hasattr(m, "base_layer")), None):
            raise ValueError(
                f"{adapted} is a LoRA layer: make it part of the weights with pipeline.fuse_lora() and "
                "pipeline.unload_lora_weights() first"
            )
        if patterns := list(self.recipe.activations.token_layers):
            select_layers([name for unit in self._plan for name in unit.layers], patterns, [])
        weights = {n: cast(Tensor, m.weight) for unit in self._plan for n, m in unit.layers.items()}
        if self.recipe.weight_formats():
            layers_without_groups(self.recipe.granularity(), weights)  # an unfit group size is better found now
        for unit in self._plan:
            for name, layer in unit.layers.items():
                weight = cast(Tensor, layer.weight).detach()
                if not weight.isfinite().all():
                    raise ValueError(f"{name}: its weight holds NaN or Inf; repair the model or exclude the layer")

    # --- the unit in work --------------------------------------------------------------------------------------

    @property
    def iterations(self) -> int:
        """Optimisation steps of the unit in work, 0 if there is nothing to learn."""
        if self.finished or not self.units[self.position].layers:
            return 0
        learns = self.recipe.rounding.learned and self.recipe.weight_formats()
        return self.recipe.rounding.iterations if learns else 0

    def enter_unit(self) -> None:
        """Captures the unit in work and makes its variables; brings both paths here after a resume."""
        if self._entered == self.position or self.finished:
            return
        data = self.calibration
        if self._replay is None:
            self._check_start()
            if self._offload is not None:
                self._move_other_components(torch.device("cpu"))
            self._replay = NetworkReplay(
                self.denoiser,
                self.units,
                data.local_set(),
                data.make_store(self.device),
                data.micro_batch,
                self.recipe.quantized_inputs,
            )
        replay = self._replay
        while replay.position < self.position:
            self._hold(replay.unit)
            self._within_memory(replay.capture, alone=True)
            self._within_memory(replay.advance, alone=True)
        self._clock = time.perf_counter()
        self._hold(replay.unit)
        self._within_memory(replay.capture, alone=True)
        self._entered = self.position
        if not self.units[self.position].layers:
            return
        energies = self._within_memory(replay.target_energies, alone=True)
        unit = UnitReconstruction(replay, energies, data.samples(), self.recipe, self.reports[self.position])
        self._unit = unit
        self._within_memory(unit.initialise)
        if self.iterations:
            self._within_memory(lambda: unit.start_learning(self._learning_state), alone=True)
            self._learning_state = None
            self._within_memory(lambda: unit.make_backward(self.device), alone=True)

    def _hold(self, unit: Unit | None) -> None:
        """Keeps one unit on the device, if they are offloaded."""
        if self._offload is not None:
            self._offload.hold([] if unit is None else parts_of(unit.module))

    def _check_start(self) -> None:
        """Finds processes that start from different files.

        Raises:
            ValueError: if there are any.
        """
        starts = distributed.all_gather_objects(
            (self.position, self.iteration, self.calibration.set.weights.sum().item())
        )
        if len(set(starts)) > 1:
            raise ValueError(
                "the processes do not start from the same checkpoint and calibration set: give --run_dir a place on a "
                "file system that they share"
            )

    def finish_unit(self) -> None:
        """Ends the unit in work and moves both paths on."""
        replay, report = cast(NetworkReplay, self._replay), self.reports[self.position]
        if self._unit is not None:
            unit, learned = self._unit, self.iterations > 0
            self.trainer.strategy.optimizers = []
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # what its CUDA graph had for itself
            self._within_memory(lambda: unit.harden(learned))
            if self.recipe.correct_biases:
                self._within_memory(unit.correct_bias)
            report.iterations = self.iteration
            self._unit = None
        self._within_memory(replay.advance, alone=True)
        report.seconds += time.perf_counter() - self._clock
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "unit_finished"):
                callback.unit_finished(self.position, len(self.units), report)
        self.position += 1
        self.iteration = 0
        if self.finished:
            replay.store.close()
            self._replay = None
            self._hold(None)

    def _within_memory(self, work: Callable[[], T], alone: bool = False) -> T:
        return within_memory(cast(NetworkReplay, self._replay), work, alone)

    def use_learned(self) -> None:
        """Leaves the pipeline running its learned quantization."""
        for component in self.pipeline.components.values():
            for module in quantized_modules(component).values() if isinstance(component, nn.Module) else ():
                module.set_mode("learned")

    # --- Lightning ---------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """Adam over the variables of the unit in work."""
        self.enter_unit()
        if not self.iterations:
            return None
        rounding = self.recipe.rounding
        variables = list(cast(UnitReconstruction, self._unit).variables())
        rates = {"v": rounding.learning_rate, "log_gain": rounding.scale_learning_rate}
        groups = [
            {"params": [p for name, p in variables if name.endswith(f".{kind}")], "lr": rate, "initial_lr": rate}
            for kind, rate in rates.items()
        ]
        groups = [g for g in groups if g["params"]]
        if self.device.type == "cuda":
            return GraphedAdam(groups, cast(NetworkReplay, self._replay).is_on_device)
        return torch.optim.Adam(groups, fused=True)

    def on_train_start(self) -> None:
        """Leaves the evaluation mode of the denoiser as it is."""
        self.denoiser.eval()

    def on_train_epoch_start(self) -> None:
        """Goes to the unit in work, with an optimiser of its own."""
        self.denoiser.eval()
        if self._entered != self.position and not self.finished:
            self.trainer.strategy.setup_optimizers(self.trainer)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Steps of learned rounding, one for each row of sample indices in `batch`."""
        if self.iteration >= self.iterations:
            return
        optimizer = cast(LightningOptimizer, self.optimizers())
        steps = range(self.iteration, self.iteration + len(batch))
        schedule = torch.tensor([self._schedule(i / self.iterations) for i in steps])
        self._backward.plan(self.calibration.shard.local_batch(batch), batch, schedule)
        for _ in steps[:-1]:
            self._step(optimizer.optimizer)
        self.log("error", self._step(optimizer))  # Lightning counts one step a batch

    @property
    def _backward(self) -> Backward:
        return cast(Backward, cast(UnitReconstruction, self._unit).backward)

    def _schedule(self, progress: float) -> tuple[float, float, float, float]:
        """beta, strength and hardness of `UnitObjective.forward`, and the factor on the learning rates."""
        rounding = self.recipe.rounding
        beta = beta_schedule(progress, rounding.warmup)
        strength = 0.0 if beta is None else rounding.regularisation
        return beta or 2.0, strength, float(progress >= rounding.straight_through), learning_rate_factor(progress)

    def _step(self, optimizer: torch.optim.Optimizer | LightningOptimizer) -> Tensor:
        error = cast(Tensor, optimizer.step(cast(Any, self._gradients)))
        self.iteration += 1
        return error

    def _gradients(self) -> Tensor:
        """The closure of a step: writes gradients and learning rates."""
        backward = self._backward
        error = gradients(cast(NetworkReplay, self._replay), backward)
        for group in cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False)).param_groups:
            group["lr"] = group["initial_lr"] * backward.rate
        return error

    def on_train_epoch_end(self) -> None:
        """Finishes the unit, unless the epoch is a resumed one that had nothing left to do."""
        if not self.finished and self._entered == self.position and self.iteration >= self.iterations:
            self.finish_unit()
        if self.finished:
            self.trainer.should_stop = True

    # --- state -------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Empty: checkpoints hold the quantization (see `on_save_checkpoint`), never the model."""
        return {}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Nothing to load."""
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def _known_modules(self) -> Iterator[tuple[str, QuantizedModule]]:
        """Layers and attention of the units that are finished or in work."""
        for unit in self.units[: self.position + 1]:
            yield from cast(dict[str, QuantizedModule], {**unit.layers, **unit.attention}).items()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the quantization of finished units and the variables of the one in work."""
        layers = {}
        for name, module in self._known_modules():
            variants = cast(dict[str, LayerQuantization], module.variants)
            layers[name] = {mode: q.to_state() for mode, q in variants.items() if mode == "nearest" or not q.roundings}
        learning = None if self._unit is None else self._unit.learning_state()
        if learning is None:
            checkpoint["optimizer_states"] = []  # of a finished unit
        if self._clock and self._entered == self.position and not self.finished:
            now = time.perf_counter()
            self.reports[self.position].seconds += now - self._clock
            self._clock = now
        checkpoint["fpq"] = {
            "made_from": self.made_from,
            "position": self.position,
            "iteration": self.iteration,
            "layers": layers,
            "learning": learning,
            "reports": [asdict(r) for r in self.reports],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what `on_save_checkpoint` wrote."""
        state = checkpoint["fpq"]
        self.position, self.iteration = state["position"], state["iteration"]
        self.reports = [UnitReport(**r) for r in state["reports"]]
        self._learning_state = state["learning"]
        for name, module in self._known_modules():
            for mode, variant in state["layers"].get(name, {}).items():
                device = next(chain(module.parameters(), self.denoiser.parameters())).device
                module.variants[mode] = LayerQuantization.from_state(variant, device)


def learning_rate_factor(progress: float) -> float:
    """Cosine decay to zero."""
    return 0.5 + 0.5 * math.cos(math.pi * progress)
