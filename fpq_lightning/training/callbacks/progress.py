"""Progress of a calibration: one bar with the time left for all units, one line for each unit that is done."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import lightning.pytorch as pl
from tqdm import tqdm

from fpq_lightning.reconstruction.report import UnitReport
from fpq_lightning.training.calibration_callback import CalibrationCallback
from fpq_lightning.training.callbacks.bar import SwitchableBar
from fpq_lightning.training.module import BlockReconstruction
from fpq_lightning.utils.progress import progress_bar


def unit_line(index: int, total: int, report: UnitReport) -> str:
    """One line about a unit: name, parameters, chosen formats, error before and after, seconds."""
    formats = []
    for chosen in (report.weight_formats, report.activation_formats):
        counts = Counter(f for names in chosen.values() for f in names)
        formats.append(" ".join(f"{name}" + (f"x{n}" if n > 1 else "") for name, n in counts.most_common()) or "fp32")
    if report.error_nearest is None:
        return f"[{index + 1:>2}/{total}] {report.name}: not quantized"
    corrected = report.kept == "nearest" and cast(float, report.error_quantized) < report.error_nearest
    kept = f"{report.kept}, bias corrected" if corrected else report.kept.replace("_", " ")
    return (
        f"[{index + 1:>2}/{total}] {report.name:<30} {report.parameters / 1e3:>8.1f}k  "
        f"{formats[0]} / {formats[1]}  error {report.error_nearest:.2e} -> {report.error_quantized:.2e} "
        f"({kept})  {report.seconds:.1f}s"
    )


class CalibrationProgress(SwitchableBar, CalibrationCallback):
    """Shows one bar over the steps of all units."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar."""
        assert isinstance(pl_module, BlockReconstruction)
        plan = pl_module.plan
        self._bar = progress_bar(
            "calibrating",
            total=sum(max(steps, 1) for steps in plan.steps),
            initial=sum(max(steps, 1) for steps in plan.steps[: plan.unit]) + plan.step,
            unit="step",
            disable=not self._enabled,
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar."""
        assert isinstance(pl_module, BlockReconstruction)
        if not pl_module.plan.finished:  # a resumed run may have only its output left to write
            self._bar.update(len(batch) or 1)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Names the unit."""
        assert isinstance(pl_module, BlockReconstruction)
        if not pl_module.plan.finished:
            self._bar.set_description(f"calibrating {pl_module.reports[pl_module.plan.unit].name}")

    def on_unit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: UnitReport) -> None:
        """Writes the unit's line."""
        assert isinstance(pl_module, BlockReconstruction)
        if self._enabled:
            tqdm.write(unit_line(pl_module.plan.unit, len(pl_module.units), report))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the bar."""
        self._bar.close()
