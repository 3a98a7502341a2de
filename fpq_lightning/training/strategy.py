"""The strategy of a calibration on several devices."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from fpq_lightning.reconstruction.optimizer import GraphedAdam
from fpq_lightning.training.watchdog import Watchdog

TRAINER_DEFAULTS: dict[str, Any] = {
    "devices": 1,
    "max_epochs": -1,
    "reload_dataloaders_every_n_epochs": 1,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}

_FIXED: dict[str, Any] = {
    "fast_dev_run": False,  # this and the next one change others
    "overfit_batches": 0.0,
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
    "reload_dataloaders_every_n_epochs": 1,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
    "max_steps": -1,
}
"""Options with which a unit would not be an epoch, or a step not a step of the recipe."""

PRECISIONS = ("32-true", "bf16-mixed")

_STOPPED = (130, 143)  # by a signal, on which all processes stop together


class _Launcher(_SubprocessScriptLauncher):
    """Lightning's launcher, whose observer of the processes it started kills this one without a word."""

    def launch(self, function: Callable, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Starts the other processes of this machine and calls the function."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=_watch_children, args=(self.procs,), daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


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

    def teardown(self) -> None:
        """Lets go of captured steps: NCCL waits for every graph that holds a collective before its group can end."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, GraphedAdam):
                optimizer.release()
        super().teardown()

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        assert self.cluster_environment is not None
        if isinstance(self._launcher, _SubprocessScriptLauncher):
            self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


def _watch_children(processes: Sequence[subprocess.Popen]) -> None:
    """Ends everything when a child has failed."""
    while any(process.poll() is None for process in processes):
        time.sleep(0.5)
        for number, process in enumerate(processes, start=1):
            if process.poll() not in (None, 0, *_STOPPED):
                for other in processes:
                    other.kill()
                print(
                    f"fpq: process {number} ended with code {process.returncode}, so all end: correct what it says, "
                    "and go on with --ckpt_path last",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


def calibration_trainer(trainer_class: type[pl.Trainer], **options: Any) -> pl.Trainer:
    """A trainer whose strategy fits: `CalibrationStrategy` where Lightning would take DDP.

    Args:
        trainer_class: of the trainer.
        options: of the trainer.

    Raises:
        ValueError: if its strategy is for several devices and not ``ddp``.
    """
    trainer = trainer_class(**options)
    strategy = trainer.strategy
    if type(strategy) is DDPStrategy and strategy._start_method == "popen":
        return trainer_class(**{**options, "strategy": CalibrationStrategy()})
    several = trainer.world_size > 1 or isinstance(strategy, DDPStrategy)
    if several and not isinstance(strategy, CalibrationStrategy):
        raise ValueError(f"trainer.strategy {type(strategy).__name__} is not supported: use ddp for several devices")
    return trainer


def precision_of(options: Mapping[str, Any]) -> str:
    """The precision that options of a trainer ask for, one of `PRECISIONS`.

    Raises:
        ValueError: if it is none of them.
    """
    given = str(options.get("precision") or PRECISIONS[0])
    found = {"32": "32-true", "bf16": "bf16-mixed"}.get(given, given)
    if found not in PRECISIONS:
        raise ValueError(f"trainer.precision {given} is not supported: use {' or '.join(PRECISIONS)}")
    return found


def check_trainer(trainer: pl.Trainer) -> None:
    """Finds options that would change what is learned, and are not in the recipe.

    Raises:
        ValueError: if there are any.
    """
    precision_of({"precision": trainer.precision})
    if any(isinstance(callback, Timer) for callback in cast(Any, trainer).callbacks):
        raise ValueError("trainer.max_time would cut a unit short: leave it out")
    for option, value in _FIXED.items():
        found = getattr(trainer, option)
        if found != value or type(found) is not type(value):  # 1.0 are all batches, and 1 is one
            raise ValueError(f"trainer.{option} {found} is not supported: leave it out")


@contextmanager
def together(trainer: pl.Trainer) -> Iterator[None]:
    """What the processes of a run do together; after it they may end one after the other.

    Raises:
        ValueError: if another process has gone.
    """
    try:
        yield
    except BaseException as error:
        if watchdog := getattr(trainer.strategy, "watchdog", None):
            orderly = isinstance(error, SystemExit) and error.code in _STOPPED
            watchdog.close() if orderly else watchdog.abandon()
        if trainer.world_size > 1 and isinstance(error, RuntimeError) and _is_loss(error):
            reason = str(error).splitlines()[0][:150]
            raise ValueError(f"another process of the run has gone ({reason}): go on with --ckpt_path last") from error
        raise
    if watchdog := getattr(trainer.strategy, "watchdog", None):
        watchdog.close()


def _is_loss(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "onnection" in str(error)
