"""Noticing that another process of a run has died."""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from fpq_lightning.utils.distributed import barrier, broadcast_from_rank0, rank, world_size


class Watchdog:
    """Ends this process when another one of the run has died, instead of waiting for it in a collective forever.

    Every process leaves a beat in a store at the first one's address, and looks at the beats of the others.

    Args:
        address: host of the first process.
        patience: seconds without a beat after which a process counts as dead.
    """

    def __init__(self, address: str, patience: float = 30.0) -> None:
        self.patience = patience
        self._stop = threading.Event()
        self._rank, self._world = rank(), world_size()
        timeout = timedelta(seconds=patience)
        first = self._rank == 0
        if first:
            self._store = dist.TCPStore(address, 0, None, True, timeout, wait_for_workers=False)
        port = broadcast_from_rank0(self._store.port if first else 0)
        if not first:
            self._store = dist.TCPStore(address, port, None, False, timeout, wait_for_workers=False)
        self._beat()
        barrier()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="fpq-watchdog")
        self._thread.start()

    def close(self) -> None:
        """Stops watching; to be called by all processes once they need each other no more."""
        self._stop.set()
        self._thread.join()
        self._store.set(f"done-{self._rank}", "1")
        if self._rank == 0:  # the store goes with the first process
            deadline = time.monotonic() + self.patience
            done = [f"done-{r}" for r in range(self._world)]
            while not self._store.check(done) and time.monotonic() < deadline:
                time.sleep(0.05)

    def abandon(self) -> None:
        """Leaves no more beats, so that the others end after their patience."""
        self._stop.set()

    def _beat(self) -> None:
        self._store.set(f"beat-{self._rank}", str(time.time_ns()))

    def _watch(self) -> None:
        seen: dict[int, tuple[bytes, float]] = {}
        while not self._stop.wait(self.patience / 10):
            try:
                self._beat()
                for other in range(self._world):
                    if self._store.check([f"done-{other}"]):
                        continue
                    beat, now = self._store.get(f"beat-{other}"), time.monotonic()
                    if seen.get(other, (b"", 0.0))[0] != beat:
                        seen[other] = (beat, now)
                    elif now - seen[other][1] > self.patience:
                        self._end(f"process {other} has not answered for {self.patience:.0f} s")
            except (RuntimeError, dist.DistError) as error:
                if not self._stop.is_set():
                    self._end(f"the first process has gone ({str(error).splitlines()[0][:100]})")

    def _end(self, reason: str) -> None:
        print(f"fpq: {reason}: process {self._rank} ends too; go on with --ckpt_path last", file=sys.stderr, flush=True)
        os._exit(1)
