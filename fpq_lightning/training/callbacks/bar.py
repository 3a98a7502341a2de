"""What the progress callbacks share: a bar that Lightning can switch off."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar


class SwitchableBar(ProgressBar):
    """A progress callback with one bar, shown unless Lightning disables it."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._enabled = True

    def disable(self) -> None:
        """Shows nothing, as Lightning asks of all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Shows again."""
        self._enabled = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the line, so that what is said of the error starts a new one."""
        if self._bar is not None:
            self._bar.close()
