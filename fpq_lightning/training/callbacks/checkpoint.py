"""Checkpoints of a calibration."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment

from fpq_lightning.training.callbacks.checkpoint_io import PlainCheckpointIO
from fpq_lightning.training.datamodule import STEPS_PER_BATCH
from fpq_lightning.training.module import BlockReconstruction
from fpq_lightning.training.unit_files import UnitFiles, contents_of
from fpq_lightning.utils import distributed
from fpq_lightning.utils.digests import digest_of
from fpq_lightning.utils.files import sync_file


class RunCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` after every unit, every so many steps within one, and when the run is told to stop.

    A checkpoint is written whole or not at all, and the one before it stays as ``previous.ckpt``. It holds the unit in
    work and names the files of finished ones (`UnitFiles`), each of which is written once. What is saved after a unit
    reaches the disk beside the next one.

    Lightning's `ModelCheckpoint` writes ``last`` only beside a monitored checkpoint, which there is none of here, and
    its handlers of SIGTERM and of SLURM's signal save in the middle of whatever step they interrupt.

    Args:
        directory: of the checkpoints.
        every_n_steps: optimisation steps between checkpoints within a unit.
    """

    def __init__(self, directory: Path, every_n_steps: int) -> None:
        self.file = directory / "last.ckpt"
        self.previous = directory / "previous.ckpt"
        self._temporary = directory / ".last.ckpt"
        self.every_n_batches = max(1, every_n_steps // STEPS_PER_BATCH)
        self.units = UnitFiles.beside(self.file)
        self._digests: list[str] = []  # of the units that are in files
        self._unwritten: dict[int, bytes] = {}  # contents of files of units
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._is_good = False
        self._requeue_signal = 0
        self._requests = [0, 0]  # to stop, and to be requeued
        self._interrupt: Any = signal.default_int_handler  # of Ctrl-C, before and after units are learned
        self._exit_code = 128 + signal.SIGTERM

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keeps checkpoints out of the system's temporary directory."""
        trainer.strategy.checkpoint_io = PlainCheckpointIO()
        # One that is damaged, so that the run goes on from the one before it, is not to take its place.
        self._is_good = str(trainer.ckpt_path) == str(self.file)

    # --- signals -----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the signals over from Lightning, which puts back what was before when the run ends."""
        environment = trainer._accelerator_connector.cluster_environment  # also where the strategy has none
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = int(environment.requeue_signal or signal.SIGUSR1)
        if threading.current_thread() is threading.main_thread():
            self._interrupt = signal.getsignal(signal.SIGINT)
            for number in filter(None, (signal.SIGTERM, signal.SIGINT, self._requeue_signal)):
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self._requests[number == self._requeue_signal] += 1
        if number == signal.SIGINT:
            self._exit_code = 128 + number
            print("\nstopping at the next step; once more to stop now", flush=True)
            signal.signal(signal.SIGINT, self._interrupt)

    def _received(self, device: torch.device) -> list[int]:
        """Requests to stop and to be requeued that the processes of the run have received."""
        if distributed.world_size() == 1:
            return self._requests
        return distributed.sum_over_ranks(torch.tensor(self._requests, device=device)).tolist()

    def _stop(self, trainer: pl.Trainer, requeue: bool) -> None:
        self._wait()
        if trainer.is_global_zero:
            requeued = requeue and _requeue_slurm_job()
            print(f"\nstopped by a signal, saved{' and requeued' * requeued}: go on with --ckpt_path last", flush=True)
        raise SystemExit(self._exit_code)

    # --- saving ------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves within a unit; its end is saved once it is finished."""
        assert isinstance(pl_module, BlockReconstruction)
        if pl_module.plan.unit_is_learned:
            return
        stop, requeue = self._received(pl_module.device)
        if stop or requeue or (batch_idx + 1) % self.every_n_batches == 0:
            self._save(trainer)
        if stop or requeue:
            self._stop(trainer, requeue > 0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves after a unit (Lightning calls this after the module's own hook)."""
        assert isinstance(pl_module, BlockReconstruction)
        self._save(trainer, beside=not pl_module.plan.finished)
        stop, requeue = self._received(pl_module.device)
        if stop or requeue:
            self._stop(trainer, requeue > 0)
        if pl_module.plan.finished and threading.current_thread() is threading.main_thread():
            # From here on they end the evaluation, which starts again on resume.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, self._interrupt)
            if self._requeue_signal:
                signal.signal(self._requeue_signal, lambda number, frame: self._stop(trainer, requeue=True))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets what is being written reach the disk."""
        if self._writing is not None:
            wait([self._writing])

    def _save(self, trainer: pl.Trainer, beside: bool = False) -> None:
        """Saves; `beside`: returns once the contents are known, and an error of writing them is raised by `_wait`."""
        self._wait()
        with self._attempt():
            trainer.save_checkpoint(self._temporary, weights_only=False)
        if trainer.is_global_zero:
            self._writing = self._writer.submit(self._publish)
            if not beside:
                self._wait()

    def _wait(self) -> None:
        """Waits until the last checkpoint is on the disk."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _publish(self) -> None:
        """Writes the units that the new checkpoint names, and lets it take its place."""
        with self._attempt():
            while self._unwritten:
                number = next(iter(self._unwritten))
                self.units.write(number, self._unwritten.pop(number))
            sync_file(self._temporary)
            if self._is_good:
                os.replace(self.file, self.previous)
            os.replace(self._temporary, self.file)
            self._is_good = True

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """Names the checkpoint in an error of the disk, and leaves nothing unfinished."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, OSError):
                error.filename = error.filename or str(self.file)
            if distributed.rank() == 0:
                self._temporary.unlink(missing_ok=True)
            raise

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Names the finished units, and holds those that have no file yet ready for one."""
        assert isinstance(pl_module, BlockReconstruction)
        for number in range(len(self._digests), pl_module.plan.unit):
            contents = contents_of(pl_module.unit_state(number))
            self._digests.append(digest_of(contents))
            if trainer.is_global_zero:
                self._unwritten[number] = contents
        checkpoint["finished_units"] = self._digests[: pl_module.plan.unit]

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Gives the module its finished units."""
        assert isinstance(pl_module, BlockReconstruction)
        self._digests = checkpoint["finished_units"]
        units = self.units.or_beside(Path(str(trainer.ckpt_path)))
        for number in range(len(self._digests)):
            pl_module.load_unit_state(number, units.read(number, self._digests))
        if units is not self.units:
            self._digests = []  # they are written here, too


def _requeue_slurm_job() -> bool:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        return subprocess.call(["scontrol", "requeue", job]) == 0
    except OSError:  # not there
        return False
