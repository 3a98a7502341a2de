"""The gradient of a unit's objective, step after step."""

from __future__ import annotations

import torch
from torch import Tensor

from fpq_lightning.reconstruction.objective import UnitObjective
from fpq_lightning.utils.distributed import sum_over_ranks, world_size


class Backward:
    """Computes the gradients of a unit's variables, summed over the processes of the run.

    The gradients of all variables are views of one buffer, so that they travel between processes as one message.
    The data of several steps is written to the device at once and read by a counter there: a step waits for nothing
    that the host does, and can be replayed as a CUDA graph.

    Attributes:
        chunk: samples of one pass; fewer need less memory and give the same sum.
        rate: factor on the learning rates in the step just made, float32 scalar.

    Args:
        objective: of the unit.
        local_size: samples of a step on this process.
        device: the compute device.
    """

    def __init__(self, objective: UnitObjective, local_size: int, device: torch.device) -> None:
        self.objective = objective
        self.chunk = local_size
        self.rate = torch.ones((), device=device)
        self._parameters = [p for p in objective.parameters() if p.requires_grad]
        sizes = [p.numel() for p in self._parameters]
        self._sums = torch.zeros(sum(sizes) + 2, device=device)  # the last two are the terms of the loss
        self._losses = self._sums[-2:]
        pieces = self._sums[:-2].split(sizes)
        self._gradients = [piece.view_as(p) for p, piece in zip(self._parameters, pieces, strict=True)]
        self._plan: list[Tensor] = []
        self._next = torch.zeros(1, dtype=torch.long, device=device)

    def plan(self, rows: Tensor, batches: Tensor, schedule: Tensor) -> None:
        """Takes the data of the next steps.

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
        """Writes the gradients of the next step.

        Returns:
            Reconstruction and rounding loss, float32 `[2]`, in memory that the next call overwrites.
        """
        rows, batch, schedule = (x.index_select(0, self._next)[0] for x in self._plan)
        # Lightning takes the gradients of the first unit of a run away.
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._run(rows, batch, schedule[:3])
        self.rate = schedule[3]
        self._next += 1
        sum_over_ranks(self._sums)
        return self._losses

    def _run(self, rows: Tensor, batch: Tensor, schedule: Tensor) -> None:
        self._sums.zero_()
        chunks = list(self.objective.replay.chunks(rows, self.chunk))
        beta, strength, hardness = schedule
        for chunk in chunks:
            # The rounding loss is the same for all; each pass adds its share.
            share = strength / (len(chunks) * world_size())
            reconstruction_loss, rounding_loss = self.objective(chunk, batch, beta, share, hardness)
            (reconstruction_loss + rounding_loss).backward()
            self._losses.add_(torch.stack([reconstruction_loss.detach(), rounding_loss.detach()]))
