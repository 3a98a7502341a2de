"""Captured activations under a byte budget."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fpq_lightning.calibration.host_memory import HostMemory
from fpq_lightning.utils.temporary import lock, remove_leftovers

STORE = "fpq-store-"  # begins the names of directories of activations

_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(size: str | int) -> int:
    """Reads a number of bytes such as ``4GiB``, ``512MB`` (also 1024-based) or ``1000000``.

    Raises:
        ValueError: if it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([bkmgt]?)(i?b)?\s*", str(size).lower())
    if match is None:
        raise ValueError(f"cannot read {size!r} as a number of bytes: write for example 4GiB")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass
class _Entry:
    """An array.

    Attributes:
        parts: its rows, one after the other.
        next_use: when it will be read next.
        tier: device, host or disk.
        dtype: of what is written and read.
        file: that holds it.
        runs: of host memory that hold its parts.
    """

    parts: list[Tensor]
    next_use: int
    tier: str
    dtype: torch.dtype
    file: Path | None = None
    runs: Sequence[Tensor] = ()

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(map(len, self.parts)), *self.parts[0].shape[1:])

    @property
    def kept_dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        """The rows from `start` to `stop`, part by part."""
        first = 0
        for part in self.parts:
            low, high = max(start - first, 0), min(stop - first, len(part))
            if low < high:
                yield part[low:high]
            first += len(part)

    def write(self, start: int, values: Tensor) -> None:
        for piece in self.pieces(start, start + len(values)):
            piece.copy_(values[: len(piece)])
            values = values[len(piece) :]

    def row(self, index: int) -> Tensor:
        return next(self.pieces(index, index + 1))[0]


class ActivationStore:
    """Arrays `[n_samples, ...]` that live on the compute device, in host memory or in memory-mapped files.

    What is needed soonest lies nearest: an array that does not fit the budget pushes out those with a later
    `next_use`, or goes out itself.

    Args:
        device: the compute device.
        dtype: the widest type in which floating-point values are kept; they are read in their own.
        budget: bytes of the compute device's memory.
        host_budget: bytes of host memory beyond it, when the device is not the host.
        directory: where files go; the system's temporary directory by default.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        budget: int = 2**32,
        host_budget: int = 2**34,
        directory: str | Path | None = None,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.budgets = {"device": budget, "host": 0 if device.type == "cpu" else host_budget}
        self.peak = 0
        self._entries: dict[str, _Entry] = {}
        self._host: HostMemory | None = None
        self._directory = directory
        self._scratch: tempfile.TemporaryDirectory | None = None
        self._lock = -1  # of the scratch directory

    def used(self, tier: str) -> int:
        """Bytes held in a tier: ``device``, ``host`` or ``disk``."""
        return sum(e.bytes for e in self._entries.values() if e.tier == tier)

    def allocate(self, key: str, shape: tuple[int, ...], dtype: torch.dtype, next_use: int) -> None:
        """Makes room for an array.

        Args:
            key: its name.
            shape: `[n_samples, ...]`.
            dtype: of what will be written.
            next_use: when it will be read next, in any unit that orders the arrays.
        """
        self.free(key)  # of an attempt that ran out of memory
        kept = self.dtype if dtype.is_floating_point and self.dtype.itemsize < dtype.itemsize else dtype
        size = torch.Size(shape).numel() * kept.itemsize
        tier = self._make_room("device", size, next_use)
        self._entries[key] = self._new(tier, shape, kept, next_use, dtype)
        self.peak = max(self.peak, self.used("device"))

    def _make_room(self, tier: str, size: int, next_use: int) -> str:
        """The tier where `size` bytes go, after moving out what is needed later."""
        if tier == "disk" or size > self.budgets[tier]:
            return "disk" if tier == "disk" else self._make_room(self._below(tier), size, next_use)
        while self.used(tier) + size > self.budgets[tier]:
            key, entry = max(
                ((k, e) for k, e in self._entries.items() if e.tier == tier), key=lambda item: item[1].next_use
            )
            if entry.next_use <= next_use:
                return self._make_room(self._below(tier), size, next_use)
            below = self._make_room(self._below(tier), entry.bytes, entry.next_use)
            self._entries[key] = self._moved(key, below)
        return tier

    def _below(self, tier: str) -> str:
        return "host" if tier == "device" and self.budgets["host"] else "disk"

    def _new(self, tier: str, shape: tuple[int, ...], kept: torch.dtype, next_use: int, dtype: torch.dtype) -> _Entry:
        if tier == "device":
            return _Entry([torch.empty(shape, dtype=kept, device=self.device)], next_use, tier, dtype)
        if tier == "host":
            self._host = self._host or HostMemory(self.budgets["host"])
            runs = self._host.allocate(shape[0], torch.Size(shape[1:]).numel() * kept.itemsize)
            parts = [run.view(kept).reshape(-1, *shape[1:]) for run in runs]
            return _Entry(parts, next_use, tier, dtype, runs=runs)
        if self._scratch is None:
            if self._directory is not None:
                Path(self._directory).mkdir(parents=True, exist_ok=True)
            self._scratch = tempfile.TemporaryDirectory(prefix=STORE, dir=self._directory)
            self._lock = lock(Path(self._scratch.name))
            remove_leftovers(Path(self._scratch.name).parent, STORE)
        with tempfile.NamedTemporaryFile(dir=self._scratch.name, delete=False) as handle:
            file = Path(handle.name)
        numel = torch.Size(shape).numel()
        tensor = torch.from_file(str(file), shared=True, size=numel, dtype=kept).reshape(shape)
        return _Entry([tensor], next_use, tier, dtype, file)

    def write(self, key: str, start: int, values: Tensor) -> None:
        """Writes rows from `start` on."""
        entry = self._entries[key]
        if entry.tier == "host" and values.device.type == "cpu" and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what was here before may still be on its way to the device
        entry.write(start, values)

    def read(self, key: str, rows: slice | Tensor) -> Tensor:
        """Rows on the compute device, in the type that was written."""
        entry = self._entries[key]
        if isinstance(rows, Tensor) and entry.tier != "host":
            (whole,) = entry.parts
            found = whole.index_select(0, rows.to(whole.device))
        elif isinstance(rows, Tensor):
            found = torch.empty((len(rows), *entry.shape[1:]), dtype=entry.kept_dtype, device=self.device)
            for to, row in zip(found, rows.tolist(), strict=True):  # each its own copy, that the GPU fetches
                to.copy_(entry.row(row), non_blocking=True)
        else:
            start, stop, _ = rows.indices(entry.shape[0])
            parts = [part.to(self.device, copy=True) for part in entry.pieces(start, stop)]  # the network may change it
            found = parts[0] if len(parts) == 1 else torch.cat([*parts, entry.parts[0][:0].to(self.device)])
        return found.to(self.device).to(entry.dtype)

    def promote(self, key: str) -> None:
        """Moves an array to the compute device if the budget has room for it now."""
        entry = self._entries[key]
        if entry.tier != "device" and self.used("device") + entry.bytes <= self.budgets["device"]:
            with suppress(torch.OutOfMemoryError):  # the budget was more than there is: it stays where it is
                self._entries[key] = self._moved(key, "device")
            self.peak = max(self.peak, self.used("device"))

    def _moved(self, key: str, tier: str) -> _Entry:
        entry = self._entries[key]
        moved = self._new(tier, entry.shape, entry.kept_dtype, entry.next_use, entry.dtype)
        start = 0
        for part in entry.parts:
            moved.write(start, part)
            start += len(part)
        self.free(key)
        return moved

    def shrink(self, budget: int) -> None:
        """Lowers the budget of the compute device, moving out what is needed latest."""
        self.budgets["device"] = min(budget, self.budgets["device"])
        while self.used("device") > self.budgets["device"]:
            resident = ((k, e) for k, e in self._entries.items() if e.tier == "device")
            key, entry = max(resident, key=lambda item: item[1].next_use)
            self._entries[key] = self._moved(key, self._make_room(self._below("device"), entry.bytes, entry.next_use))

    def holds(self, key: str) -> bool:
        """Whether there is such an array."""
        return key in self._entries

    def on_device(self, key: str) -> bool:
        """Whether an array lies on the compute device."""
        return self._entries[key].tier == "device"

    def schedule(self, key: str, next_use: int) -> None:
        """Says anew when an array will be read next."""
        self._entries[key].next_use = next_use

    def free(self, key: str) -> None:
        """Forgets an array."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        if entry.file is not None:
            entry.file.unlink()
        for run in entry.runs:
            cast(HostMemory, self._host).free(run)

    def close(self) -> None:
        """Forgets everything and removes the files."""
        for key in list(self._entries):
            self.free(key)
        if self._host is not None:
            self._host.close()
            self._host = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None
            os.close(self._lock)
