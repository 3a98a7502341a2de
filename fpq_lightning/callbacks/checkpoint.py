"""Checkpoints of a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from fpq_lightning.calibration.datamodule import STEPS_PER_BATCH
from fpq_lightning.reconstruction.module import BlockReconstruction
from fpq_lightning.storage.files import whole_file


class RunCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` after every unit and every so many steps within one, whole or not at all.

    Lightning's `ModelCheckpoint` writes ``last`` only beside a monitored checkpoint, which there is none of here.

    Args:
        directory: of the checkpoint.
        every_n_steps: optimisation steps between checkpoints within a unit.
    """

    def __init__(self, directory: Path, every_n_steps: int) -> None:
        self.file = directory / "last.ckpt"
        self.every_n_batches = max(1, every_n_steps // STEPS_PER_BATCH)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves within a unit; its end is saved once it is finished."""
        assert isinstance(pl_module, BlockReconstruction)
        if (batch_idx + 1) % self.every_n_batches == 0 and pl_module.iteration < pl_module.iterations:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves after a unit (Lightning calls this after the module's own hook)."""
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        with whole_file(self.file) as temporary:
            trainer.save_checkpoint(temporary)
