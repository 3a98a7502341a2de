"""Going on with less when the compute device is out of memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from fpq_lightning.calibration.replay import NetworkReplay
from fpq_lightning.reconstruction.backward import Backward
from fpq_lightning.utils import distributed

T = TypeVar("T")


def within_memory(replay: NetworkReplay, work: Callable[[], T], alone: bool = False) -> T:
    """Does work that can be done again, with less memory each time the device runs out of it.

    Args:
        replay: whose store and samples a pass are halved.
        work: to do.
        alone: whether it is done without the other processes; what they do together none can do again by itself.

    Raises:
        torch.OutOfMemoryError: if it cannot be done with less.
    """
    while True:
        try:
            return work()
        except torch.OutOfMemoryError as error:
            shortage = error.with_traceback(None)  # which would keep what the work had allocated
        if not (alone or distributed.world_size() == 1) or not save_memory(replay):
            raise shortage


def gradients(replay: NetworkReplay, backward: Backward) -> Tensor:
    """Writes the gradients of the next step, with fewer samples at a time where the device runs out of memory.

    Args:
        replay: at the unit.
        backward: of the unit; its `chunk` stays at what was enough.

    Returns:
        The step's relative error.

    Raises:
        torch.OutOfMemoryError: if one sample at a time is too much.
    """
    while True:
        try:
            return backward()
        except torch.OutOfMemoryError as error:
            shortage = error.with_traceback(None)
        device = replay.store.device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise shortage  # the step goes on kernel by kernel; a graph would hold the failed attempt, too
        if backward.chunk > 1:
            backward.chunk = -(-backward.chunk // 2)
            warnings.warn(f"{device} is out of memory: {backward.chunk} samples at a time", stacklevel=2)
        elif not save_memory(replay):
            raise shortage


def save_memory(replay: NetworkReplay) -> bool:
    """Halves the store's share of the device and the samples of a pass; False if there is nothing to halve."""
    store = replay.store
    held = store.used("device") if store.device.type == "cuda" else 0
    if replay.micro_batch == 1 and not held:
        return False
    replay.micro_batch = max(1, replay.micro_batch // 2)
    if held:
        store.shrink(held // 2)
    if store.device.type == "cuda":
        torch.cuda.empty_cache()
    warnings.warn(
        f"{store.device} is out of memory: going on with {store.budgets['device'] / 2**30:.2f} GiB of activations "
        f"there and {replay.micro_batch} samples a pass (data.store_budget, data.micro_batch)",
        stacklevel=3,
    )
    return True
