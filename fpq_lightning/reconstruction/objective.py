"""What the reconstruction of a unit minimises."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fpq_lightning.calibration.replay import NetworkReplay, output_leaves
from fpq_lightning.layers import LayerQuantization, Mode, running
from fpq_lightning.rounding import LearnedRounding, rounding_regulariser


def relative_error(outputs: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Weighted squared error over the weighted energy of the targets, averaged over the outputs of a unit.

    Args:
        outputs: `[batch, ...]` each, or with further dimensions folded into the first.
        targets: likewise.
        weights: of the samples, `[batch]`.
    """

    def energy(x: Tensor) -> Tensor:
        return (x.reshape(len(weights), -1).square().mean(1) * weights).sum()

    pairs = zip(outputs, targets, strict=True)
    return torch.stack([energy(o - t) / energy(t).clamp(min=1e-12) for o, t in pairs]).mean()


@torch.no_grad()
def unit_error(replay: NetworkReplay, mode: Mode, rows: Tensor) -> float:
    """Relative error of the current unit over given samples."""
    outputs: list[list[Tensor]] = []
    with running(replay.unit.module, mode):
        for chunk in rows.split(replay.micro_batch):
            outputs.append(output_leaves(replay.call(replay.inputs(chunk))))
    joined = [torch.cat(leaves) for leaves in zip(*outputs, strict=True)]
    return relative_error(joined, replay.targets(rows), replay.weights(rows)).item()


class UnitObjective(nn.Module):
    """Loss of the current unit as a function of sample indices and the state of the schedule.

    ``error / error of nearest rounding + strength * mean(1 - |2h - 1|^beta)``: in units of the error of nearest
    rounding one strength of the regulariser serves all units.

    Args:
        replay: at the unit.
        quantizations: of the unit's layers, being learned.
        nearest_error: relative error of nearest rounding.
    """

    def __init__(self, replay: NetworkReplay, quantizations: Iterable[LayerQuantization], nearest_error: float) -> None:
        super().__init__()
        self.replay = replay
        self.module = replay.unit.module
        self.quantizations = list(quantizations)
        self.nearest_error = max(nearest_error, 1e-12)

    def forward(self, rows: Tensor, beta: Tensor, strength: Tensor, hardness: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and relative error.

        Args:
            rows: indices of calibration samples, int64 `[batch]`.
            beta: exponent of the regulariser, float32 scalar.
            strength: weight of the regulariser, 0 during the warm-up, float32 scalar.
            hardness: of the rounding in the forward pass, 0 or 1, float32 scalar.
        """
        for rounding in self._roundings():
            rounding.hardness = hardness
        outputs = output_leaves(self.replay.call(self.replay.inputs(rows)))
        error = relative_error(outputs, self.replay.targets(rows), self.replay.weights(rows))
        return error / self.nearest_error + strength * self._regulariser(beta), error.detach()

    def _roundings(self) -> list[LearnedRounding]:
        return [rounding for q in self.quantizations for rounding in q.roundings]

    def _regulariser(self, beta: Tensor) -> Tensor:
        hs = [rounding.h() for rounding in self._roundings()]
        total = sum(h.numel() for h in hs)
        return torch.stack([rounding_regulariser(h, beta) * (h.numel() / total) for h in hs]).sum()
