"""What the reconstruction of a unit minimises.

Every sum over samples is a sum over the processes that hold them, and over the parts in which a process takes its
samples; what the samples are compared with (`energies`) is known to all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fpq_lightning.calibration.replay import NetworkReplay, sample_energies
from fpq_lightning.nn.calibrated import LayerQuantization, Mode, running
from fpq_lightning.quantization.rounding import LearnedRounding
from fpq_lightning.reconstruction.attention_gradients import GradientsLikeOutputs
from fpq_lightning.utils.distributed import sum_over_ranks


def error_energies(replay: NetworkReplay, rows: Tensor) -> Tensor:
    """Weighted mean square of the current unit's error on samples of this process, `[n, outputs]`."""
    outputs = replay.by_sample(replay.call(replay.inputs(rows)), rows)
    differences = [o.float() - t.float() for o, t in zip(outputs, replay.targets(rows), strict=True)]
    return sample_energies(differences, replay.weights(rows))


def relative_error(errors: Tensor, targets: Tensor) -> Tensor:
    """Energy of the error over the energy of the targets, both `[outputs]`, averaged over the outputs of a unit."""
    return (errors / targets.clamp(min=1e-12)).mean()


@torch.no_grad()
def unit_error(replay: NetworkReplay, mode: Mode, rows: Tensor, targets: Tensor) -> float:
    """Relative error of the current unit.

    Args:
        replay: at the unit.
        mode: in which its layers run.
        rows: those of the samples that this process holds.
        targets: energy of the targets over the samples of all processes, `[outputs]`.
    """
    total = torch.zeros_like(targets, dtype=torch.float64)
    with running(replay.unit.module, mode):
        for chunk in replay.chunks(rows):
            total += error_energies(replay, chunk).double().sum(0)
    return relative_error(sum_over_ranks(total), targets.double()).item()


class UnitObjective(nn.Module):
    """The loss of the current unit as a function of sample indices and the state of the schedule.

    ``error / error of the start + strength * mean(1 - |2h - 1|^beta)``: in units of the error that
    learning starts from one strength of the regulariser serves all units.

    Args:
        replay: at the unit.
        quantizations: of the unit's layers, being learned.
        start_error: relative error of the rounding that learning starts from.
        energies: of the targets, of all samples, `[n_samples, outputs]`.
    """

    def __init__(
        self,
        replay: NetworkReplay,
        quantizations: Iterable[LayerQuantization],
        start_error: float,
        energies: Tensor,
    ) -> None:
        super().__init__()
        self.replay = replay
        self.module = replay.unit.module
        self.quantizations = list(quantizations)
        self.start_error = max(start_error, 1e-12)
        self.energies = energies

    def forward(
        self, rows: Tensor, batch: Tensor, beta: Tensor, strength: Tensor, hardness: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What some samples of a batch add to its reconstruction loss and rounding loss; the loss is their sum.

        Args:
            rows: those samples, among the ones of this process, int64.
            batch: the samples of the whole batch, among all, int64.
            beta: exponent of the regulariser, float32 scalar.
            strength: weight of the regulariser, 0 during the warm-up, float32 scalar.
            hardness: of the rounding in the forward pass, 0 or 1, float32 scalar.
        """
        roundings = [rounding for q in self.quantizations for rounding in q.roundings]
        for rounding in roundings:
            rounding.hardness = hardness
        with GradientsLikeOutputs() if rows.is_cuda else nullcontext():
            errors = error_energies(self.replay, rows)
        error = relative_error(errors.sum(0), self.energies[batch].sum(0))
        return error / self.start_error, strength * rounding_loss(roundings, beta)


def rounding_loss(roundings: Sequence[LearnedRounding], beta: Tensor) -> Tensor:
    """Mean of ``1 - |2h - 1|^beta`` over all variables of a unit (AdaRound, equation 24)."""
    total = sum(rounding.v.numel() for rounding in roundings)
    return torch.stack([r.regulariser(beta) * (r.v.numel() / total) for r in roundings]).sum()
