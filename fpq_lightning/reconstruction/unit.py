"""The life of one unit: capture, search, learning, and the choice between learned and nearest rounding."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fpq_lightning.calibration.replay import NetworkReplay
from fpq_lightning.calibration.shards import Samples
from fpq_lightning.graph.chain import parts_of
from fpq_lightning.nn.attention import QuantizedAttention, observing
from fpq_lightning.nn.calibrated import LayerQuantization, Mode, QuantizedLayer, QuantizedModule, running
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.reconstruction.backward import Backward
from fpq_lightning.reconstruction.closed_form import solve_unit
from fpq_lightning.reconstruction.initialise import Inputs, collect_layer_inputs, search_attention, search_unit
from fpq_lightning.reconstruction.objective import UnitObjective, unit_error
from fpq_lightning.reconstruction.optimizer import GraphedAdam
from fpq_lightning.reconstruction.out_of_memory import gradients, within_memory
from fpq_lightning.reconstruction.report import UnitReport
from fpq_lightning.reconstruction.schedule import schedule
from fpq_lightning.utils import distributed
from fpq_lightning.utils.side_work import side_work

T = TypeVar("T")


def advance(replay: NetworkReplay) -> None:
    """Carries both paths through the current unit, which is quantized already."""
    within_memory(replay, lambda: replay.capture(to_learn=False), alone=True)
    within_memory(replay, replay.advance, alone=True)


class UnitTrainer:
    """Quantizes the unit that a replay is at, in plain torch.

    The order of calls is `begin`, `train` until the steps are done, `stop_learning`, `harden`, `held_out_error`, `end`.
    What runs out of memory is done again with less. A unit without layers to quantize is carried along.

    Args:
        replay: at the unit.
        samples: of the calibration set.
        recipe: what to quantize to.
        report: to fill in.
    """

    def __init__(self, replay: NetworkReplay, samples: Samples, recipe: Recipe, report: UnitReport) -> None:
        self.replay = replay
        self.samples = samples
        self.recipe = recipe
        self.report = report
        self.unit = replay.unit
        self.layers = cast(dict[str, QuantizedLayer], self.unit.layers)
        self.attention = cast(dict[str, QuantizedAttention], self.unit.attention)
        self.quantized: dict[str, QuantizedModule] = {**self.layers, **self.attention}
        self.backward: Backward | None = None
        self.unreached: set[str] = set()  # layers that no sample to learn from reaches
        self._clock = time.perf_counter()

    def begin(self, learns: bool, state: dict[str, Tensor] | None = None) -> None:
        """Captures what the unit sees, chooses formats and clips, and makes the variables to learn.

        Args:
            learns: whether rounding is learned.
            state: of `learning_state`, to go on from.
        """
        if self.replay.store.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of other sizes
        self.capture()
        if self.layers:
            self._within_memory(self.initialise)
        if self.layers and learns:
            self._within_memory(lambda: self.start_learning(state), alone=True)

    def _within_memory(self, work: Callable[[], T], alone: bool = False) -> T:
        return within_memory(self.replay, work, alone)

    def _variant(self, mode: str) -> list[LayerQuantization]:
        return [cast(LayerQuantization, module.variants[mode]) for module in self.quantized.values()]

    # --- the start ---------------------------------------------------------------------------------------------

    def capture(self) -> None:
        """Stores what the unit sees and should give."""
        self._within_memory(self.replay.capture, alone=True)
        if self.layers:
            energies = self._within_memory(self.replay.target_energies, alone=True)
            placement = self.samples.shard.placement(torch.arange(self.samples.n))
            self.energies = distributed.gather_rows(energies, placement)

    def initialise(self) -> None:
        """Searches formats and clips and rounds in closed form, unless a checkpoint held them."""
        if self.report.error_nearest is None:
            self._search()
        if self.recipe.solves and self.report.error_closed_form is None:
            self._solve()
        for module in self.quantized.values():
            module.variants["quantized"] = cast(LayerQuantization, module.variants[self.start]).copy()
            module.set_mode("quantized")

    @property
    def start(self) -> Mode:
        """The better of nearest and closed-form rounding, on held-out samples."""
        nearest, solved = cast(float, self.report.error_nearest), self.report.error_closed_form
        return "nearest" if solved is None or solved > nearest else "closed_form"

    @property
    def start_error(self) -> float:
        """Error of `start`."""
        report = self.report
        return cast(float, report.error_nearest if self.start == "nearest" else report.error_closed_form)

    def _solve(self) -> None:
        reached = {name: layer for name, layer in self.layers.items() if name not in self.unreached}
        rows, held_out = (self.samples.local(of) for of in (self.samples.train, self.samples.held_out))
        solve_unit(self.replay, reached, rows, held_out, self.recipe)
        without = [self.layers[name] for name in self.unreached]
        for module in [*without, *self.attention.values()]:
            module.variants["closed_form"] = cast(LayerQuantization, module.variants["nearest"]).copy()
        self.report.error_closed_form = self._error("closed_form")

    def _search(self) -> None:
        rows, shard = self.samples.search, self.samples.shard
        order: list[Tensor] = []
        with observing(self.attention) as operands:
            layer_inputs = collect_layer_inputs(self.unit, self._calls(rows, order))
        self._look_further(layer_inputs)
        local_weights = self.replay.weights(self.samples.local(rows))
        weights = distributed.gather_rows(local_weights, shard.placement(rows))
        called = torch.cat(order)
        weights = weights[called.to(weights.device)]
        passes = -(-len(rows) // self.replay.samples_a_pass)
        search_unit(self.unit, layer_inputs, weights, self.recipe, passes, rows[called.to(rows.device)])
        if operands:
            search_attention(self.unit, operands, self.recipe)
        self.report.error_nearest = self._error("nearest")
        for name, module in self.quantized.items():
            nearest = cast(LayerQuantization, module.variants["nearest"])
            self.report.activation_formats[name] = [q.format.name for q in nearest.inputs]
            if name in self.layers:
                self.report.weight_formats[name] = [q.format.name for q in nearest.weights]

    def _calls(self, rows: Tensor, order: list[Tensor]) -> Iterator[Any]:
        """Calls the unit with samples of all processes, and adds to `order` which of them each call takes."""
        placement = self.samples.shard.placement(rows)
        for positions, inputs in self.replay.gathered_inputs(self.samples.local(rows), placement):
            order.append(positions)
            yield self.replay.call(inputs)

    def _look_further(self, layer_inputs: dict[str, Inputs]) -> None:
        """Adds the inputs of layers, such as experts, that samples beyond those of the search reach first."""
        for rows in self.samples.train.split(len(self.samples.search)):
            missing = {name: layer for name, layer in self.unit.layers.items() if name not in layer_inputs}
            if not missing:
                break
            layer_inputs |= collect_layer_inputs(replace(self.unit, layers=missing), self._calls(rows, []))
        self.unreached = self.unit.layers.keys() - layer_inputs.keys()
        if self.unreached:
            names = ", ".join(name for name in self.unit.layers if name in self.unreached)
            warnings.warn(
                f"{names}: no sample to learn from reaches them, so rounded to nearest, with inputs in full precision",
                stacklevel=2,
            )

    def start_learning(self, state: dict[str, Tensor] | None) -> None:
        """Makes the variables of the unit, and what computes their gradients.

        Args:
            state: of `learning_state`, to go on from.
        """
        rounding = self.recipe.rounding
        for layer in self.layers.values():
            quantization = cast(LayerQuantization, layer.variants["quantized"])
            quantization.start_learning(layer.weight_rows(), rounding.scale_aware)
            if rounding.learn_weight_scales:
                for quantizer in quantization.weights:
                    quantizer.learn_scale()
        if rounding.learn_activation_scales:
            for quantization in self._variant("quantized"):
                for quantizer in quantization.inputs:
                    quantizer.learn_scale()
        if state is not None:
            with torch.no_grad():
                for name, parameter in self.variables():
                    parameter.copy_(state[name])
        objective = UnitObjective(self.replay, self._variant("quantized"), self.start_error, self.energies)
        shard = self.samples.shard
        local_size = len(range(shard.rank, shard.strata, shard.world_size))
        self.backward = Backward(objective, local_size, self.replay.store.device)

    # --- learning ----------------------------------------------------------------------------------------------

    def variables(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is learned: names end in ``.v`` (rounding) or ``.log_gain`` (scales)."""
        for name, parameter in nn.ModuleList(self._variant("quantized")).named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def learning_state(self) -> dict[str, Tensor] | None:
        """The values of the variables, None if nothing is being learned."""
        return None if self.backward is None else {name: p.detach() for name, p in self.variables()}

    def adam(self, rounding_rate: float, scale_rate: float) -> torch.optim.Optimizer:
        """Adam over the rounding variables and scales; on a GPU its steps are replays of a CUDA graph."""
        rates = {"v": rounding_rate, "log_gain": scale_rate}
        variables = list(self.variables())
        groups = [
            {"params": [p for name, p in variables if name.endswith(f".{kind}")], "lr": rate, "initial_lr": rate}
            for kind, rate in rates.items()
        ]
        groups = [group for group in groups if group["params"]]
        if self.replay.store.device.type == "cuda":
            return GraphedAdam(groups, self.replay.is_on_device)
        return torch.optim.Adam(groups, fused=True)

    def train(
        self, batches: Tensor, first: int, optimizer: torch.optim.Optimizer, last_step: Callable[..., Any]
    ) -> Tensor:
        """Optimisation steps of the objective (`UnitObjective`).

        Args:
            batches: samples of each step, among all, int64 `[steps, batch_size]`.
            first: number of the first step.
            optimizer: of `adam`.
            last_step: makes the last step in place of ``optimizer.step``.

        Returns:
            Reconstruction and rounding loss of the last step, float32 `[2]`, in memory that the next step overwrites.
        """
        backward = cast(Backward, self.backward)
        steps = range(first, first + len(batches))
        local = self.samples.shard.local_batch(batches)
        backward.plan(local, batches, schedule(steps, self.recipe.rounding))

        def closure() -> Tensor:
            losses = gradients(self.replay, backward)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * backward.rate
            return losses

        for _ in steps[:-1]:
            optimizer.step(closure)  # type: ignore[arg-type]  # a step returns what its closure does
        return cast(Tensor, last_step(closure))

    # --- the end -----------------------------------------------------------------------------------------------

    def stop_learning(self) -> None:
        """Lets go of what computes the gradients."""
        self.backward = None

    def harden(self) -> None:
        """Turns the variables into codes and scales.

        Raises:
            RuntimeError: if the processes of the run do not agree on them.
        """
        if self.replay.store.device.type == "cuda":
            torch.cuda.empty_cache()  # what the CUDA graph had for itself
        for module in self.quantized.values():
            cast(LayerQuantization, module.variants["quantized"]).finish_learning()
            module.set_mode("full_precision")
        self._check_agreement()

    def held_out_error(self, mode: Mode) -> float:
        """Error of the unit's output in a mode, relative to its energy, on the held-out samples of all processes."""
        return self._within_memory(lambda: self._error(mode))

    def _error(self, mode: Mode) -> float:
        held_out = self.samples.held_out
        targets = self.energies[held_out.to(self.energies.device)].sum(0)
        return unit_error(self.replay, mode, self.samples.local(held_out), targets)

    def end(self, error: float | None, iterations: int) -> None:
        """Keeps the better of learned and nearest rounding, corrects the bias, and moves both paths on.

        Args:
            error: of `held_out_error` in mode ``quantized``; None for a unit without layers to quantize.
            iterations: optimisation steps that were made.
        """
        if error is not None:
            self._keep_better(error, learned=iterations > 0)
            if self.recipe.correct_biases and self.report.kept != "closed_form":  # which has biases of its own
                self._within_memory(self.correct_bias)
            self.report.iterations = iterations
        self._within_memory(self.replay.advance, alone=True)
        self.lap()

    def lap(self) -> None:
        """Adds the time since the last call, or since the start, to the report."""
        now = time.perf_counter()
        self.report.seconds += now - self._clock
        self._clock = now

    def _keep_better(self, error: float, learned: bool) -> None:
        report = self.report
        if error <= self.start_error:
            report.kept, report.error_quantized = "learned" if learned else self.start, error
        else:
            report.kept, report.error_quantized = self.start, self.start_error
            for module in self.quantized.values():
                module.variants["quantized"] = cast(LayerQuantization, module.variants[self.start]).copy()
        for module in self.quantized.values():
            if "closed_form" in module.variants:
                del module.variants["closed_form"]
        for name, layer in self.layers.items():  # the closed form chooses formats of its own
            report.weight_formats[name] = [q.format.name for q in layer.variants["quantized"].weights]

    def _check_agreement(self) -> None:
        if distributed.world_size() == 1:
            return
        digest = hashlib.blake2b(digest_size=16)
        for quantization in self._variant("quantized"):
            scales = [cast(Tensor, q.scale) for q in [*quantization.weights, *quantization.inputs]]
            for tensor in [*(quantization.codes or []), *(s for s in scales if s is not None)]:
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        if len(set(distributed.all_gather_objects(digest.hexdigest()))) > 1:
            raise RuntimeError(
                f"{self.unit.name}: the processes learned different weights; use devices of one kind, and report this"
            )

    def correct_bias(self) -> None:
        """Takes the mean error of the unit's output out of its last layer's bias, if that helps held-out samples.

        Rounding shifts the mean of a layer's output (Nagel et al. 2019, section 4.2). A unit with further outputs, or
        whose output has other channels than the layer, is left as it is.
        """
        layer = list(self.layers.values())[-1]
        if layer.bias is None:
            return
        total = torch.full((len(layer.weight) + 1,), torch.nan, dtype=torch.float64, device=layer.weight.device)
        # What one process cannot add up, none may use.
        with (
            side_work(f"{self.unit.name}: bias correction", but=torch.OutOfMemoryError),
            torch.no_grad(),
            running(self.unit.module, "quantized"),
        ):
            total = self._mean_errors(layer)
        distributed.sum_over_ranks(total)
        if not total.isfinite().all() or not total[-1] > 0:
            return
        quantization = cast(LayerQuantization, layer.variants["quantized"])
        before = quantization.bias
        quantization.set_bias((layer.bias if before is None else before) + (total[:-1] / total[-1]).float())
        error = corrected = cast(float, self.report.error_quantized)
        try:
            corrected = self._error("quantized")
        finally:
            if corrected < error:
                self.report.error_quantized = corrected
            else:
                quantization.bias = before

    def _mean_errors(self, layer: QuantizedLayer) -> Tensor:
        """Sums of the errors of each output channel over samples of this process, and last of the samples' weights.

        All NaN if the unit's output is not that of the layer.
        """
        replay, n_outputs = self.replay, len(parts_of(self.unit.module))
        total = torch.zeros(len(layer.weight) + 1, dtype=torch.float64, device=layer.weight.device)
        for r in replay.chunks(self.samples.local(self.samples.train)):
            outputs, targets = replay.by_sample(replay.call(replay.inputs(r)), r), replay.targets(r)
            shape = outputs[-1].shape
            channels = range(-len(shape), 0)
            if (
                len(outputs) != n_outputs
                or layer.channel_dim not in channels
                or shape[layer.channel_dim] != len(total) - 1
            ):
                return total.fill_(torch.nan)
            difference = (targets[-1].double() - outputs[-1].double()).movedim(layer.channel_dim, -1)
            weights = replay.weights(r)
            # Places of a sample lie together where there are so many to each; otherwise all count alike.
            each = difference.reshape(len(r), -1, len(total) - 1).mean(1)
            total[:-1] += (each * weights[:, None]).sum(0)
            total[-1] += weights.sum()
        return total
