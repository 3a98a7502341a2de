"""Copies of tensors from ordinary host memory to a GPU, at nearly the speed of page-locked memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fpq_lightning.utils.pinned_memory import pin, unpin

_ALIGNMENT = 256


class Staging:
    """Two page-locked buffers: the threads of the CPU fill one while the GPU still reads the other.

    Weights in files that are mapped to memory are so read without a further copy of them in memory.

    Args:
        device: that copies go to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self._locked = [False, False]
        self._read: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Contiguous copies on the device, side by side in one allocation.

        Args:
            tensors: in host memory, of any shapes and types.
        """
        sizes = [x.numel() * x.element_size() for x in tensors]
        starts = [0, *accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
        buffer = self._next_buffer(starts[-1])

        def views(memory: Tensor) -> list[Tensor]:
            places = zip(tensors, starts, sizes, strict=False)
            return [memory[start : start + size].view(x.dtype).view(x.shape) for x, start, size in places]

        for place, x in zip(views(buffer), tensors, strict=True):
            place.copy_(x)
        found = torch.empty(starts[-1], dtype=torch.uint8, device=self.device)
        found.copy_(buffer[: starts[-1]], non_blocking=True)
        if self.device.type == "cuda":
            event = self._read[self._turn] = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        return views(found)

    def _next_buffer(self, size: int) -> Tensor:
        self._turn = 1 - self._turn
        if (event := self._read[self._turn]) is not None:
            event.synchronize()
        if len(self._buffers[self._turn]) < size:
            self._free(self._turn)
            buffer = self._buffers[self._turn] = torch.empty(size, dtype=torch.uint8)
            self._locked[self._turn] = pin(buffer)
        return self._buffers[self._turn]

    def _free(self, turn: int) -> None:
        if self._locked[turn]:
            unpin(self._buffers[turn])
        self._buffers[turn], self._locked[turn] = torch.empty(0, dtype=torch.uint8), False

    def close(self) -> None:
        """Gives the buffers back."""
        for turn in range(2):
            self._free(turn)
