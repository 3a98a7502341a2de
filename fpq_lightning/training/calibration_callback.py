"""The hook that calibration adds to those of Lightning's callbacks."""

from __future__ import annotations

import lightning.pytorch as pl

from fpq_lightning.reconstruction.report import UnitReport


class CalibrationCallback(pl.Callback):
    """A callback that is also told when a unit ends."""

    def on_unit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: UnitReport) -> None:
        """Called when a unit is quantized, before the plan moves on to the next one.

        Args:
            trainer: of the run.
            pl_module: `BlockReconstruction`.
            report: what became of the unit.
        """
