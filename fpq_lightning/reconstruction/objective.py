"""What the reconstruction of a unit minimises."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpq_lightning.calibration.replay import NetworkReplay, output_leaves
from fpq_lightning.layers import LayerQuantization, running
from fpq_lightning.rounding import rounding_regulariser


def relative_error(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Squared error over the energy of the targets, averaged over the outputs of a unit."""
    pairs = zip(outputs, targets, strict=True)
    return torch.stack([(o - t).square().mean() / t.square().mean().clamp(min=1e-12) for o, t in pairs]).mean()


@torch.no_grad()
def unit_error(replay: NetworkReplay, mode: Any, rows: Tensor) -> float:
    """Relative error of the current unit over given samples."""
    with running(replay.unit.module, mode):
        chunks = rows.split(replay.micro_batch)
        errors = [relative_error(output_leaves(replay.call(replay.inputs(r))), replay.targets(r)) for r in chunks]
    total = sum(error.item() * len(r) for error, r in zip(errors, chunks, strict=True))
    return total / len(rows)


class UnitObjective(nn.Module):
    """Loss of the current unit as a function of sample indices and the state of the schedule.

    ``error / error of nearest rounding + strength * mean(1 - |2h - 1|^beta)``: in units of the error of nearest
    rounding one strength of the regulariser serves all units.

    Args:
        replay: at the unit.
        quantizations: of the unit's layers, being learned.
        nearest_error: relative error of nearest rounding.
    """

    def __init__(
        self, replay: NetworkReplay, quantizations: Iterable[LayerQuantization], nearest_error: float
    ) -> None:
        super().__init__()
        self.replay = replay
        self.module = replay.unit.module
        self.quantizations = list(quantizations)
        self.nearest_error = max(nearest_error, 1e-12)

    def forward(self, rows: Tensor, beta: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and relative error.

        Args:
            rows: indices of calibration samples, int64 `[batch]`.
            beta: exponent of the regulariser, float32 scalar.
            strength: weight of the regulariser, 0 during the warm-up, float32 scalar.
        """
        outputs = output_leaves(self.replay.call(self.replay.inputs(rows)))
        error = relative_error(outputs, self.replay.targets(rows))
        return error / self.nearest_error + strength * self._regulariser(beta), error.detach()

    def _regulariser(self, beta: Tensor) -> Tensor:
        hs = [rounding.h() for q in self.quantizations for rounding in q.roundings]
        total = sum(h.numel() for h in hs)
        return torch.stack([rounding_regulariser(h, beta) * (h.numel() / total) for h in hs]).sum()
