"""The LightningModule: block-wise learned rounding, one unit of the network an epoch."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import lightning.pytorch as pl
import torch
from diffusers import DiffusionPipeline
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from fpq_lightning.calibration.datamodule import CalibrationDataModule
from fpq_lightning.calibration.replay import NetworkReplay, output_leaves
from fpq_lightning.layers import LayerQuantization, QuantizedLayer, make_quantized, running
from fpq_lightning.model.blocks import Unit, discover_units
from fpq_lightning.model.trace import trace_units
from fpq_lightning.pipelines import denoiser_name
from fpq_lightning.recipes import Recipe
from fpq_lightning.reconstruction.backward import Backward, GraphedBackward
from fpq_lightning.reconstruction.initialise import collect_layer_inputs, search_unit
from fpq_lightning.reconstruction.objective import UnitObjective, unit_error
from fpq_lightning.rounding import beta_schedule

warnings.filterwarnings("ignore", message=".*`LightningModule.configure_optimizers` returned `None`.*")


@dataclass
class UnitReport:
    """What became of one unit; errors are relative to the energy of its full-precision output, on held-out samples.

    Attributes:
        name: of the unit.
        parameters: of its quantized layers.
        weight_formats: chosen formats by layer (one for each part of the input channels).
        activation_formats: likewise.
        error_nearest: with nearest rounding.
        error_learned: with what was kept.
        kept: ``learned`` or ``nearest``.
        iterations: optimisation steps.
        seconds: spent on the unit in all, over resumed runs.
    """

    name: str
    parameters: int
    weight_formats: dict[str, list[str]] = field(default_factory=dict)
    activation_formats: dict[str, list[str]] = field(default_factory=dict)
    error_nearest: float | None = None
    error_learned: float | None = None
    kept: str = "nearest"
    iterations: int = 0
    seconds: float = 0.0


class BlockReconstruction(pl.LightningModule):
    """Quantizes the denoiser of a pipeline, a unit an epoch, in execution order.

    A unit is captured (its inputs on the quantized path, its full-precision outputs), its formats and clips are
    searched, its rounding is learned for the epoch, hardened, and compared with nearest rounding on held-out
    samples; then both paths move on through it.

    Args:
        pipeline: a diffusers pipeline in full precision.
        recipe: what to quantize to.
    """

    def __init__(self, pipeline: DiffusionPipeline, recipe: Recipe) -> None:
        super().__init__()
        self.automatic_optimization = False  # many steps a batch: a step is shorter than Lightning's way around it
        self.pipeline = pipeline
        self.recipe = recipe
        self.denoiser: nn.Module = getattr(pipeline, denoiser_name(pipeline)).eval().requires_grad_(False)
        self.strict_loading = False
        self._plan = discover_units(self.denoiser, recipe.include, recipe.exclude)
        self._check_weights()
        self.units: list[Unit] = []
        self.reports: list[UnitReport] = []
        self.fingerprint = ""  # of the run, kept in its checkpoints
        self.position = 0  # the unit in work
        self.iteration = 0  # its optimisation steps done
        self._entered = -1  # the unit whose activations are captured and variables made
        self._replay: NetworkReplay | None = None
        self._backward: Backward | None = None
        self._learning_state: dict[str, Any] | None = None
        self._clock = time.perf_counter()

    # --- structure ---------------------------------------------------------------------------------------------

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
        if self.trainer.world_size > 1:
            raise ValueError("calibration on several devices is not supported yet: use --trainer.devices 1")
        if self.units:
            return
        device = next(self.denoiser.parameters()).device
        first = self.calibration.set.batch(slice(0, 1), device)
        self.units, splits = trace_units(self.denoiser, self._plan, first)
        ran = {unit.name for unit in self.units}
        if skipped := [unit.name for unit in self._plan if unit.name not in ran and unit.layers]:
            warnings.warn(f"not run by the denoiser, so left in full precision: {', '.join(skipped)}", stacklevel=2)
        for unit in self.units:
            for name, layer in unit.layers.items():
                quantized = make_quantized(
                    layer, self.recipe.granularity(), splits.get(name) if self.recipe.split_skips else None
                )
                for part in quantized.weight_parts():
                    quantized.granularity.rows(part, name)  # an unfit group size is better found now
            self.reports.append(UnitReport(unit.name, unit.parameters))

    def _check_weights(self) -> None:
        """Finds what cannot be quantized before minutes are spent on calibration data."""
        granularity = self.recipe.granularity()
        for unit in self._plan:
            for name, layer in unit.layers.items():
                weight = cast(Tensor, layer.weight).detach()
                granularity.rows(weight, name)
                if not weight.isfinite().all():
                    raise ValueError(f"{name}: its weight holds NaN or Inf; repair the model or exclude the layer")

    def _layers(self, unit: Unit) -> dict[str, QuantizedLayer]:
        return cast(dict[str, QuantizedLayer], unit.layers)

    def _variants(self, unit: Unit, mode: str) -> list[LayerQuantization]:
        return [cast(LayerQuantization, layer.variants[mode]) for layer in unit.layers.values()]  # type: ignore

    # --- the life of a unit ------------------------------------------------------------------------------------

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
        if self._replay is None:
            self._replay = NetworkReplay(
                self.denoiser,
                self.units,
                self.calibration.set,
                self.calibration.make_store(self.device),
                self.calibration.micro_batch,
                self.recipe.quantized_inputs,
            )
        while self._replay.position < self.position:
            self._replay.capture()
            self._replay.advance()
        self._clock = time.perf_counter()
        self._replay.capture()
        self._entered = self.position
        unit = self.units[self.position]
        if unit.layers:
            self._initialise(unit)

    def _initialise(self, unit: Unit) -> None:
        replay = cast(NetworkReplay, self._replay)
        report = self.reports[self.position]
        fresh = "nearest" not in next(iter(self._layers(unit).values())).variants
        if fresh:
            rows = torch.arange(min(self.calibration.n_search, self.calibration.n_train))
            layer_inputs = collect_layer_inputs(unit, lambda: replay.call(replay.inputs(rows)))
            search_unit(unit, layer_inputs, replay.weights(rows), self.recipe)
            report.error_nearest = unit_error(replay, "nearest", self.calibration.held_out())
            for name, layer in self._layers(unit).items():
                nearest = cast(LayerQuantization, layer.variants["nearest"])
                report.weight_formats[name] = [q.format.name for q in nearest.weights]
                report.activation_formats[name] = [q.format.name for q in nearest.inputs]
        for layer in self._layers(unit).values():
            layer.variants["learned"] = cast(LayerQuantization, layer.variants["nearest"]).copy()
            layer.set_mode("learned")
        if self.iterations:
            self._start_learning(unit)

    def _start_learning(self, unit: Unit) -> None:
        rounding = self.recipe.rounding
        for layer in self._layers(unit).values():
            quantization = cast(LayerQuantization, layer.variants["learned"])
            quantization.start_learning(layer.weight_rows(), rounding.scale_aware)
            for quantizer in quantization.weights if rounding.learn_weight_scales else []:
                quantizer.learn_scale()
            for quantizer in quantization.inputs if rounding.learn_activation_scales else []:
                quantizer.learn_scale()
        if self._learning_state is not None:
            nn.ModuleList(self._variants(unit, "learned")).load_state_dict(self._learning_state)
            self._learning_state = None
        objective = UnitObjective(
            cast(NetworkReplay, self._replay),
            self._variants(unit, "learned"),
            cast(float, self.reports[self.position].error_nearest),
        )
        replayed = self.device.type == "cuda" and cast(NetworkReplay, self._replay).is_on_device()
        backward = GraphedBackward if replayed else Backward
        with self.trainer.precision_plugin.forward_context():
            self._backward = backward(objective, self.calibration.batch_size, self.device)

    def finish_unit(self) -> None:
        """Hardens the unit in work, keeps the better of learned and nearest, and moves both paths on."""
        replay = cast(NetworkReplay, self._replay)
        unit, report = self.units[self.position], self.reports[self.position]
        self._backward = None
        if unit.layers:
            held_out = self.calibration.held_out()
            for layer in self._layers(unit).values():
                cast(LayerQuantization, layer.variants["learned"]).finish_learning()
                layer.set_mode("full_precision")
            report.error_learned = unit_error(replay, "learned", held_out)
            report.kept = "learned" if self.iterations else "nearest"
            if not report.error_learned <= cast(float, report.error_nearest):
                report.kept, report.error_learned = "nearest", report.error_nearest
                for layer in self._layers(unit).values():
                    layer.variants["learned"] = cast(LayerQuantization, layer.variants["nearest"]).copy()
            if self.recipe.correct_biases:
                report.error_learned = self._correct_bias(unit, cast(float, report.error_learned))
            report.iterations = self.iteration
        replay.advance()
        report.seconds += time.perf_counter() - self._clock
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "unit_finished"):
                callback.unit_finished(self.position, len(self.units), report)
        self.position += 1
        self.iteration = 0
        if self.finished:
            replay.store.close()
            self._replay = None

    def use_learned(self) -> None:
        """Leaves the denoiser running its learned quantization."""
        for unit in self.units:
            for layer in self._layers(unit).values():
                layer.set_mode("learned")

    def _correct_bias(self, unit: Unit, error: float) -> float:
        """Takes the mean error of the unit's output out of its last layer's bias, if that helps held-out samples.

        Rounding shifts the mean of a layer's output (Nagel et al. 2019, section 4.2).
        """
        replay = cast(NetworkReplay, self._replay)
        layer = list(self._layers(unit).values())[-1]
        if layer.bias is None:
            return error
        quantization = cast(LayerQuantization, layer.variants["learned"])
        rows = torch.arange(self.calibration.n_train).split(self.calibration.micro_batch)
        total: Tensor | float = 0.0
        with torch.no_grad(), running(unit.module, "learned"):
            for r in rows:
                outputs, targets = output_leaves(replay.call(replay.inputs(r))), replay.targets(r)
                if len(outputs) != 1 or outputs[0].shape[layer.channel_dim] != len(layer.weight):
                    return error
                difference = (targets[0] - outputs[0]).transpose(1, layer.channel_dim).double()
                weighted = difference.flatten(2).mean(2) if difference.ndim > 2 else difference
                weights = replay.weights(r).repeat_interleave(len(weighted) // len(r))
                total = total + (weighted * weights[:, None]).sum(0) * (len(r) / len(weighted))
        before = quantization.bias
        shift = (cast(Tensor, total) / replay.weights(torch.cat(rows)).sum()).float()
        quantization.set_bias((layer.bias if before is None else before) + shift)
        corrected = unit_error(replay, "learned", self.calibration.held_out())
        if corrected < error:
            return corrected
        quantization.bias = before
        return error

    # --- Lightning ---------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """Adam over the variables of the unit in work."""
        self.enter_unit()
        if not self.iterations:
            return None
        rounding = self.recipe.rounding
        variants = self._variants(self.units[self.position], "learned")
        learned = list(nn.ModuleList(variants).named_parameters())
        rates = {"v": rounding.learning_rate, "log_gain": rounding.scale_learning_rate}
        groups = [
            {"params": [p for name, p in learned if name.endswith(f".{kind}")], "lr": rate, "initial_lr": rate}
            for kind, rate in rates.items()
        ]
        fused = self.device.type == "cuda"
        return torch.optim.Adam([g for g in groups if g["params"]], fused=fused)

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
        for i, rows in enumerate(batch):
            error = self._step(rows, optimizer if i == len(batch) - 1 else optimizer.optimizer)
        self.log("error", error)

    def _step(self, rows: Tensor, optimizer: torch.optim.Optimizer | LightningOptimizer) -> Tensor:
        rounding = self.recipe.rounding
        progress = self.iteration / self.iterations
        beta = beta_schedule(progress, rounding.warmup)
        strength = 0.0 if beta is None else rounding.regularisation
        error = cast(Backward, self._backward)(
            rows, (beta or 2.0, strength, float(progress >= rounding.straight_through))
        )
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * learning_rate_factor(progress)
        optimizer.step()
        self.iteration += 1
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

    def _known_layers(self) -> Iterator[tuple[str, QuantizedLayer]]:
        for unit in self.units[: self.position + 1]:
            yield from self._layers(unit).items()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the quantization of finished units and the variables of the one in work."""
        layers = {}
        for name, layer in self._known_layers():
            variants = cast(dict[str, LayerQuantization], layer.variants)
            layers[name] = {mode: q.to_state() for mode, q in variants.items() if mode == "nearest" or not q.roundings}
        learning = None
        if self._backward is not None:
            learning = dict(nn.ModuleList(self._variants(self.units[self.position], "learned")).state_dict())
        if self._clock and self._entered == self.position and not self.finished:
            now = time.perf_counter()
            self.reports[self.position].seconds += now - self._clock
            self._clock = now
        checkpoint["fpq"] = {
            "fingerprint": self.fingerprint,
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
        if self._learning_state is None:
            checkpoint["optimizer_states"] = []  # of a finished unit
        device = next(self.denoiser.parameters()).device
        for name, layer in self._known_layers():
            for mode, variant in state["layers"].get(name, {}).items():
                layer.variants[mode] = LayerQuantization.from_state(variant, device)


def learning_rate_factor(progress: float) -> float:
    """Cosine decay to zero."""
    return 0.5 + 0.5 * math.cos(math.pi * progress)
