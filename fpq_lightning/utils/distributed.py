"""Communication between the processes of a run; without a process group there is one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sums a tensor over all processes, in place; every process gets the same bits."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_objects(value: T) -> list[T]:
    """The value of every process, in the order of ranks; tensors in it must lie on the CPU."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_rank0(value: T) -> T:
    """The value of the first process."""
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Waits for all processes."""
    all_gather_objects(None)


def gather_rows(values: Tensor, owned: Sequence[Tensor]) -> Tensor:
    """Gathers rows from all processes.

    Args:
        values: the rows of this process, `[m, ...]`.
        owned: for each rank, the places of its rows, int64 `[m_rank]`; each place once.

    Returns:
        All rows, `[sum of m_rank, ...]`, on every process.
    """
    if world_size() == 1:
        return values
    found = values.new_empty(sum(len(rows) for rows in owned), *values.shape[1:])
    for source, rows in enumerate(owned):
        if len(rows):
            part = values.contiguous() if source == rank() else values.new_empty(len(rows), *values.shape[1:])
            dist.broadcast(part, source)
            found[rows.to(found.device)] = part
    return found
