"""The gradient of a unit's objective: one call, or the replay of a CUDA graph."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from fpq_lightning.reconstruction.objective import UnitObjective

_WARMUP = 3  # passes before a capture, as torch.cuda.make_graphed_callables does


class Backward:
    """Computes the gradients of a unit's variables.

    Args:
        objective: of the unit.
        batch_size: samples a step.
        device: the compute device.
    """

    def __init__(self, objective: UnitObjective, batch_size: int, device: torch.device) -> None:
        self.objective = objective
        self.device = device

    def __call__(self, rows: Tensor, schedule: tuple[float, float, float]) -> Tensor:
        """Writes the gradients and returns the relative error.

        Args:
            rows: indices of calibration samples, int64 `[batch]`.
            schedule: beta, strength and hardness of `UnitObjective.forward`.
        """
        self._forget_gradients()
        return self._run(rows, torch.tensor(schedule, device=self.device))

    def _forget_gradients(self) -> None:
        for parameter in self.objective.parameters():
            parameter.grad = None

    def _run(self, rows: Tensor, schedule: Tensor) -> Tensor:
        loss, error = self.objective(rows, *schedule)
        loss.backward()
        return error


class GraphedBackward(Backward):
    """The same as one launch: the steps of small units are bound by kernel launches, not by arithmetic.

    What a step reads must lie on the device.
    """

    def __init__(self, objective: UnitObjective, batch_size: int, device: torch.device) -> None:
        super().__init__(objective, batch_size, device)
        self._rows = torch.zeros(batch_size, dtype=torch.long, device=device)
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
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.enable_grad():
            for _ in range(_WARMUP):
                self._forget_gradients()
                self._run(self._rows, self._schedule)
        torch.cuda.current_stream().wait_stream(stream)
        self._forget_gradients()  # so that the captured pass makes them, and each replay overwrites them
        with torch.cuda.graph(self._graph), torch.enable_grad():
            self._error = self._run(self._rows, self._schedule)

    def __call__(self, rows: Tensor, schedule: tuple[float, float, float]) -> Tensor:
        self._rows.copy_(rows)
        self._schedule.copy_(torch.tensor(schedule))
        self._graph.replay()
        return self._error
