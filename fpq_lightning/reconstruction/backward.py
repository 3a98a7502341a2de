"""The gradient of a unit's objective: one call, or the replay of a CUDA graph."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from fpq_lightning.distributed import sum_over_ranks, world_size
from fpq_lightning.reconstruction.objective import UnitObjective

_WARMUP = 3  # passes before a capture, as torch.cuda.make_graphed_callables does


class Backward:
    """Computes the gradients of a unit's variables, summed over the processes of the run.

    The gradients of all variables are views of one buffer, so that they travel between processes as one message.

    Attributes:
        chunk: samples that a pass takes at a time; fewer need less memory and give the same sum.

    Args:
        objective: of the unit.
        batch_size: samples a step, of all processes.
        local_size: samples a step, of this process.
        device: the compute device.
    """

    def __init__(self, objective: UnitObjective, batch_size: int, local_size: int, device: torch.device) -> None:
        self.objective = objective
        self.chunk = local_size
        self._parameters = [p for p in objective.parameters() if p.requires_grad]
        sizes = [p.numel() for p in self._parameters]
        self._sums = torch.zeros(sum(sizes) + 1, device=device)  # the last one is the error
        pieces = self._sums[:-1].split(sizes)
        self._gradients = [piece.view_as(p) for p, piece in zip(self._parameters, pieces, strict=True)]

    def __call__(self, rows: Tensor, batch: Tensor, schedule: Tensor) -> Tensor:
        """Writes the gradients and returns the relative error of the batch, a scalar that the next call overwrites.

        Args:
            rows: samples of the batch among those of this process, int64 `[local_size]`.
            batch: samples of the batch among all, int64 `[batch_size]`.
            schedule: beta, strength and hardness of `UnitObjective.forward`, float32 `[3]`.
        """
        self._attach()
        self._run(rows, batch, schedule)
        return sum_over_ranks(self._sums)[-1]

    def _attach(self) -> None:
        """Puts the gradients where autograd adds to them; Lightning takes those of the first unit of a run away."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _run(self, rows: Tensor, batch: Tensor, schedule: Tensor) -> None:
        self._sums.zero_()
        chunks = rows.split(self.chunk)
        beta, strength, hardness = schedule
        for chunk in chunks:
            # The regulariser is the same for all; each pass adds its share.
            loss, error = self.objective(chunk, batch, beta, strength / (len(chunks) * world_size()), hardness)
            loss.backward()
            self._sums[-1].add_(error)


class GraphedBackward(Backward):
    """The same as one launch: the steps of small units are bound by kernel launches, not by arithmetic.

    What a step reads must lie on the device.
    """

    def __init__(self, objective: UnitObjective, batch_size: int, local_size: int, device: torch.device) -> None:
        super().__init__(objective, batch_size, local_size, device)
        self._rows = torch.zeros(local_size, dtype=torch.long, device=device)
        self._batch = torch.zeros(batch_size, dtype=torch.long, device=device)
        self._schedule = torch.ones(3, device=device)
        self._graph = torch.cuda.CUDAGraph()
        gc.collect()
        gc.disable()  # an older graph that is collected during the capture would break it
        try:
            # A weight that autocast had cached before the capture would never change again.
            with torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
                self._capture()
        finally:
            gc.enable()

    def _capture(self) -> None:
        self._attach()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.enable_grad():
            for _ in range(_WARMUP):
                super()._run(self._rows, self._batch, self._schedule)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"), torch.enable_grad():
            super()._run(self._rows, self._batch, self._schedule)

    def _run(self, rows: Tensor, batch: Tensor, schedule: Tensor) -> None:
        self._rows.copy_(rows)
        self._batch.copy_(batch)
        self._schedule.copy_(schedule)
        self._graph.replay()
