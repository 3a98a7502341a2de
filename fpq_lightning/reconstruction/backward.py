"""The gradient of a unit's objective, step after step."""

from __future__ import annotations

import torch
from torch import Tensor

from fpq_lightning.reconstruction.objective import UnitObjective
from fpq_lightning.utils.distributed import sum_over_ranks, world_size


class Backward:
    """Computes the gradients of a unit's variables, summed over the processes of the run.

    The gradients of all variables are views of one buffer, so that they travel between processes as one message.
    What steps need is told for several of them at once and read by a counter on the device: a step waits for nothing
    that the host does, and can be replayed as a CUDA graph.

    Attributes:
        chunk: samples that a pass takes at a time; fewer need less memory and give the same sum.
        rate: factor on the learning rates in the step just made, float32 scalar.

    Args:
        objective: of the unit.
        local_size: samples a step, of this process.
        device: the compute device.
    """

    def __init__(self, objective: UnitObjective, local_size: int, device: torch.device) -> None:
        self.objective = objective
        self.chunk = local_size
        self.rate = torch.ones((), device=device)
        self._parameters = [p for p in objective.parameters() if p.requires_grad]
        sizes = [p.numel() for p in self._parameters]
        self._sums = torch.zeros(sum(sizes) + 1, device=device)  # the last one is the error
        pieces = self._sums[:-1].split(sizes)
        self._gradients = [piece.view_as(p) for p, piece in zip(self._parameters, pieces, strict=True)]
        self._plan: list[Tensor] = []
        self._next = torch.zeros(1, dtype=torch.long, device=device)

    def plan(self, rows: Tensor, batches: Tensor, schedule: Tensor) -> None:
        """Says what the next steps are.

        Args:
            rows: samples of each step among those of this process, int64 `[steps, local_size]`; never more steps than
                in the first call.
            batches: samples of each step among all, int64 `[steps, batch_size]`.
            schedule: beta, strength and hardness of `UnitObjective.forward`, and the factor on the learning rates,
                float32 `[steps, 4]`.
        """
        if not self._plan:
            self._plan = [x.to(self._next.device, copy=True) for x in (rows, batches, schedule)]
        for mine, theirs in zip(self._plan, (rows, batches, schedule), strict=True):
            mine[: len(theirs)].copy_(theirs)
        self._next.zero_()

    def __call__(self) -> Tensor:
        """Writes the gradients of the next step; returns its relative error, a scalar that the next call overwrites."""
        rows, batch, schedule = (x.index_select(0, self._next)[0] for x in self._plan)
        # Lightning takes the gradients of the first unit of a run away.
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._run(rows, batch, schedule[:3])
        self.rate = schedule[3]
        self._next += 1
        return sum_over_ranks(self._sums)[-1]

    def _run(self, rows: Tensor, batch: Tensor, schedule: Tensor) -> None:
        self._sums.zero_()
        chunks = rows.split(self.chunk)
        beta, strength, hardness = schedule
        for chunk in chunks:
            # The regulariser is the same for all; each pass adds its share.
            loss, error = self.objective(chunk, batch, beta, strength / (len(chunks) * world_size()), hardness)
            loss.backward()
            self._sums[-1].add_(error)
