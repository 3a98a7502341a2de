"""Page-locked host memory for arrays. It stays locked when they are freed, for locking takes longer than copying."""

from __future__ import annotations

import torch
from torch import Tensor

from fpq_lightning.utils.pinned_memory import pin, unpin

_SLAB = 2**30
_ALIGNMENT = 64


class HostMemory:
    """Slabs of host memory that a GPU reads and writes at full speed, handed out in runs of whole rows.

    An array gets several runs where no free one is long enough, so that hardly any memory lies idle.

    Args:
        budget: bytes; slabs are no larger.
    """

    def __init__(self, budget: int) -> None:
        self._slab = min(_SLAB, budget)
        self._slabs: list[tuple[Tensor, bool]] = []  # and whether it is page-locked
        self._free: list[tuple[int, int, int]] = []  # slab, first byte, and the byte after the last

    def allocate(self, rows: int, row_bytes: int) -> list[Tensor]:
        """Memory of some rows, in as few runs as the free memory allows.

        Returns:
            uint8 `[bytes]` each, a multiple of `row_bytes` (of one byte for rows of none).
        """
        row_bytes = max(row_bytes, 1)
        found = []
        while rows:
            slab, start, stop = max(self._free, key=lambda run: run[2] - run[1], default=(0, 0, 0))
            fitting = min(rows, (stop - start) // row_bytes)
            if not fitting:
                self._add_slab(max(self._slab, row_bytes))
                continue
            self._free.remove((slab, start, stop))
            used = start + -(-fitting * row_bytes // _ALIGNMENT) * _ALIGNMENT
            if used < stop:
                self._free.append((slab, used, stop))
            found.append(self._slabs[slab][0][start : start + fitting * row_bytes])
            rows -= fitting
        return found

    def _add_slab(self, size: int) -> None:
        size = -(-size // _ALIGNMENT) * _ALIGNMENT
        slab = torch.empty(size, dtype=torch.uint8).fill_(0)  # by all threads, which locking does not
        self._slabs.append((slab, pin(slab)))
        self._free.append((len(self._slabs) - 1, 0, size))

    def free(self, run: Tensor) -> None:
        """Takes back a run of `allocate`."""
        base = run.untyped_storage().data_ptr()
        slab = next(i for i, (memory, _) in enumerate(self._slabs) if memory.untyped_storage().data_ptr() == base)
        start = int(run.storage_offset())
        stop = start + -(-run.numel() // _ALIGNMENT) * _ALIGNMENT
        neighbours = [other for other in self._free if other[0] == slab and (other[2] == start or other[1] == stop)]
        for other in neighbours:
            self._free.remove(other)
            start, stop = min(start, other[1]), max(stop, other[2])
        self._free.append((slab, start, stop))

    def close(self) -> None:
        """Gives everything back to the system."""
        for slab, locked in self._slabs:
            if locked:
                unpin(slab)
        self._slabs, self._free = [], []
