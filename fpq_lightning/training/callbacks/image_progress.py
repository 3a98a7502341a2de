"""Progress of sampling images."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from fpq_lightning.training.callbacks.bar import SwitchableBar
from fpq_lightning.training.generation import SeedDataModule
from fpq_lightning.utils.progress import progress_bar


class ImageProgress(SwitchableBar):
    """Shows a bar over the images that this process samples in ``test`` or ``predict``."""

    def _open(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, SeedDataModule)
        total = -(-len(data.seeds) // trainer.world_size)
        self._bar = progress_bar("sampling", total=total, unit="image", disable=not self._enabled)

    def _move(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._bar.update(len(batch["seeds"]))

    def _close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar.close()

    on_test_start = on_predict_start = _open
    on_test_batch_end = on_predict_batch_end = _move
    on_test_end = on_predict_end = _close
