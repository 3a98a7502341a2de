"""The life of one unit: search, learning, and the choice between learned and nearest rounding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from fpq_lightning.calibration.replay import NetworkReplay
from fpq_lightning.calibration.shards import Samples
from fpq_lightning.graph.chain import parts_of
from fpq_lightning.graph.tree import output_leaves
from fpq_lightning.nn.attention import QuantizedAttention, observing
from fpq_lightning.nn.calibrated import LayerQuantization, QuantizedLayer, QuantizedModule, running
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.reconstruction.backward import Backward
from fpq_lightning.reconstruction.initialise import collect_layer_inputs, search_attention, search_unit
from fpq_lightning.reconstruction.objective import UnitObjective, unit_error
from fpq_lightning.utils import distributed


@dataclass
class UnitReport:
    """What became of one unit; errors are relative to the energy of its full-precision output, on held-out samples.

    Attributes:
        name: of the unit.
        parameters: of its quantized layers.
        weight_formats: chosen formats by layer (one for each part of the input channels).
        activation_formats: likewise; of a module that computes attention those of query, key, value and softmax.
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


class UnitReconstruction:
    """Quantizes the unit that a replay has captured.

    Args:
        replay: at the unit, which has quantized layers.
        energies: of the replay's `target_energies`, for the samples of this process.
        samples: of the calibration set.
        recipe: what to quantize to.
        report: to fill in.
    """

    def __init__(
        self, replay: NetworkReplay, energies: Tensor, samples: Samples, recipe: Recipe, report: UnitReport
    ) -> None:
        self.replay = replay
        self.samples = samples
        self.recipe = recipe
        self.report = report
        self.unit = replay.unit
        self.layers = cast(dict[str, QuantizedLayer], self.unit.layers)
        self.attention = cast(dict[str, QuantizedAttention], self.unit.attention)
        self.quantized: dict[str, QuantizedModule] = {**self.layers, **self.attention}
        placement = samples.shard.placement(torch.arange(samples.n))
        self.energies = distributed.gather_rows(energies, placement)
        self.backward: Backward | None = None

    def _variant(self, mode: str) -> list[LayerQuantization]:
        return [cast(LayerQuantization, module.variants[mode]) for module in self.quantized.values()]

    def _error(self, mode: Any) -> float:
        """Relative error on the held-out samples."""
        held_out = self.samples.held_out
        targets = self.energies[held_out.to(self.energies.device)].sum(0)
        return unit_error(self.replay, mode, self.samples.local(held_out), targets)

    def initialise(self) -> None:
        """Searches formats and clips, unless a checkpoint held them, and starts learning from nearest rounding."""
        if self.report.error_nearest is None:
            self._search()
        for module in self.quantized.values():
            module.variants["learned"] = cast(LayerQuantization, module.variants["nearest"]).copy()
            module.set_mode("learned")

    def _search(self) -> None:
        rows, shard = self.samples.search, self.samples.shard
        inputs = self.replay.gathered_inputs(self.samples.local(rows), shard.placement(rows))
        with observing(self.attention) as operands:
            layer_inputs = collect_layer_inputs(self.unit, map(self.replay.call, inputs))
        local_weights = self.replay.weights(self.samples.local(rows))
        weights = distributed.gather_rows(local_weights, shard.placement(rows))
        search_unit(self.unit, layer_inputs, weights, self.recipe, -(-len(rows) // self.replay.micro_batch))
        if operands:
            search_attention(self.unit, operands, self.recipe)
        self.report.error_nearest = self._error("nearest")
        for name, module in self.quantized.items():
            nearest = cast(LayerQuantization, module.variants["nearest"])
            self.report.activation_formats[name] = [q.format.name for q in nearest.inputs]
            if name in self.layers:
                self.report.weight_formats[name] = [q.format.name for q in nearest.weights]

    # --- learning ----------------------------------------------------------------------------------------------

    def start_learning(self, state: dict[str, Tensor] | None) -> None:
        """Makes the variables of the unit.

        Args:
            state: of `learning_state`, to go on from.
        """
        rounding = self.recipe.rounding
        for layer in self.layers.values():
            quantization = cast(LayerQuantization, layer.variants["learned"])
            quantization.start_learning(layer.weight_rows(), rounding.scale_aware)
            for quantizer in quantization.weights if rounding.learn_weight_scales else []:
                quantizer.learn_scale()
        for quantization in self._variant("learned") if rounding.learn_activation_scales else []:
            for quantizer in quantization.inputs:
                quantizer.learn_scale()
        with torch.no_grad():
            for name, parameter in self.variables() if state is not None else ():
                parameter.copy_(cast(dict[str, Tensor], state)[name])

    def variables(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is learned: names end in ``.v`` (rounding) or ``.log_gain`` (scales)."""
        for name, parameter in nn.ModuleList(self._variant("learned")).named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def learning_state(self) -> dict[str, Tensor] | None:
        """The values of the variables, None if nothing is being learned."""
        return None if self.backward is None else {name: p.detach() for name, p in self.variables()}

    def make_backward(self, device: torch.device) -> None:
        """Prepares the steps of learning."""
        objective = UnitObjective(
            self.replay, self._variant("learned"), cast(float, self.report.error_nearest), self.energies
        )
        shard = self.samples.shard
        local_size = len(range(shard.rank, shard.strata, shard.world_size))
        self.backward = Backward(objective, local_size, device)

    # --- the end -----------------------------------------------------------------------------------------------

    def harden(self, learned: bool) -> None:
        """Hardens the variables and keeps the better of learned and nearest rounding.

        Args:
            learned: whether anything was.

        Raises:
            RuntimeError: if the processes of the run do not agree on the result.
        """
        self.backward = None
        report = self.report
        for module in self.quantized.values():
            cast(LayerQuantization, module.variants["learned"]).finish_learning()
            module.set_mode("full_precision")
        self._check_agreement()
        error = self._error("learned")
        if error <= cast(float, report.error_nearest):
            report.kept, report.error_learned = "learned" if learned else "nearest", error
            return
        report.kept, report.error_learned = "nearest", report.error_nearest
        for module in self.quantized.values():
            module.variants["learned"] = cast(LayerQuantization, module.variants["nearest"]).copy()

    def _check_agreement(self) -> None:
        if distributed.world_size() == 1:
            return
        digest = hashlib.blake2b(digest_size=16)
        for quantization in self._variant("learned"):
            scales = [cast(Tensor, q.scale) for q in [*quantization.weights, *quantization.inputs]]
            for tensor in [*(quantization.codes or []), *(s for s in scales if s is not None)]:
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        if len(set(distributed.all_gather_objects(digest.hexdigest()))) > 1:
            raise RuntimeError(
                f"{self.unit.name}: the processes learned different weights; use devices of one kind, and report this"
            )

    def correct_bias(self) -> None:
        """Takes the mean error of the unit's output out of its last layer's bias, if that helps held-out samples.

        Rounding shifts the mean of a layer's output (Nagel et al. 2019, section 4.2).
        """
        replay = self.replay
        layer = list(self.layers.values())[-1]
        if layer.bias is None:
            return
        total = torch.zeros(len(layer.weight) + 1, dtype=torch.float64, device=layer.weight.device)
        fits, n_outputs = True, len(parts_of(self.unit.module))
        with torch.no_grad(), running(self.unit.module, "learned"):
            for r in self.samples.local(self.samples.train).split(replay.micro_batch):
                outputs, targets = output_leaves(replay.call(replay.inputs(r))), replay.targets(r)
                if len(outputs) != n_outputs or outputs[-1].shape[layer.channel_dim] != len(layer.weight):
                    fits = False
                    break
                difference = (targets[-1].double() - outputs[-1].double()).transpose(1, layer.channel_dim)
                shift = difference.flatten(2).mean(2) if difference.ndim > 2 else difference
                weights = replay.weights(r)
                spread = weights.repeat_interleave(len(shift) // len(r)) * (len(r) / len(shift))
                total[:-1] += (shift * spread[:, None]).sum(0)
                total[-1] += weights.sum()
        if not fits:
            return
        distributed.sum_over_ranks(total)
        quantization = cast(LayerQuantization, layer.variants["learned"])
        before = quantization.bias
        quantization.set_bias((layer.bias if before is None else before) + (total[:-1] / total[-1]).float())
        error = corrected = cast(float, self.report.error_learned)
        try:
            corrected = self._error("learned")
        finally:
            if corrected < error:
                self.report.error_learned = corrected
            else:
                quantization.bias = before
