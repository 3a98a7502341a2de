"""Adam whose steps, gradient included, are replays of one CUDA graph."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WARMUP = 3  # steps before the capture, as torch.cuda.make_graphed_callables does


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """One for all units: cuBLAS keeps a workspace for every stream that it has met."""
    return torch.cuda.Stream()


class GraphedAdam(torch.optim.Adam):
    """Adam that launches a whole step at once: the steps of small units are bound by launches, not by arithmetic.

    The first steps run kernel by kernel. Then one is captured and all further ones are replays of it: their closures
    are not called again, so all that changes from step to step must lie in tensors of the device that stay where they
    are. A step that cannot be captured leaves everything as it is, at the speed of the first ones.

    Args:
        parameters: as of `torch.optim.Adam`, on a CUDA device.
        may_capture: asked when the time of the capture has come.
    """

    def __init__(self, parameters: Any, may_capture: Callable[[], bool]) -> None:
        super().__init__(parameters, fused=True, capturable=True)
        self._may_capture = may_capture
        self._until_capture = _WARMUP
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = _side_stream()
        self._error = torch.zeros(())

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: writes the gradients and the learning rates, and returns the error.

        Returns:
            What the closure does, in memory that the next step overwrites.
        """
        if self._until_capture == 0:
            self._graph = self._captured(closure) if self._may_capture() else None
        self._until_capture -= 1
        if self._graph is not None:
            self._graph.replay()
            return self._error
        # On another stream than the default one, which a capture must not meet.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._error = super().step(closure)
        torch.cuda.current_stream().wait_stream(self._stream)
        return self._error

    def release(self) -> None:
        """Lets go of the captured step; no further one is made."""
        self._graph = None

    def _captured(self, closure: Callable[[], Tensor]) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        gc.disable()  # an older graph that is collected during the capture would break it
        try:
            # A weight that autocast had cached before the capture would never change again.
            with (
                torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False),
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ):
                self._error = super().step(closure)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            warnings.warn(f"steps are launched kernel by kernel, for they make no CUDA graph: {reason}", stacklevel=1)
            return None
        finally:
            gc.enable()
        return graph
