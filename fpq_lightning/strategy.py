"""The strategy of a calibration on several devices."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy

from fpq_lightning.distributed import Watchdog


class CalibrationStrategy(DDPStrategy):
    """DDP for variables that change with every unit.

    DDP's wrapper averages the gradients of the parameters that it found at first, so there is none: the
    reconstruction adds gradients up itself. A process that dies ends the others.
    """

    watchdog: Watchdog

    def setup_environment(self) -> None:
        """Starts watching once the processes know each other."""
        super().setup_environment()
        assert self.cluster_environment is not None
        self.watchdog = Watchdog(self.cluster_environment.main_address)

    def configure_ddp(self) -> None:
        """Leaves the module unwrapped."""


def prepare_strategy(trainer: pl.Trainer) -> None:
    """Gives the trainer a strategy that fits.

    Raises:
        ValueError: if the trainer's is for several devices and not ``ddp``.
    """
    strategy: Any = trainer.strategy
    if type(strategy) is DDPStrategy:
        strategy.__class__ = CalibrationStrategy
    elif trainer.world_size > 1 and not isinstance(strategy, CalibrationStrategy):
        raise ValueError(f"trainer.strategy {type(strategy).__name__} is not supported: use ddp for several devices")


def stop_watching(trainer: pl.Trainer) -> None:
    """Lets the processes of a run end one after the other."""
    if isinstance(trainer.strategy, CalibrationStrategy):
        trainer.strategy.watchdog.close()
