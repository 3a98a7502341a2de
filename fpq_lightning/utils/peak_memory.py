"""Peak memory of a process on a device, as a whole and since some moment."""

from __future__ import annotations

import resource

import torch

_before: dict[torch.device, int] = {}  # peaks of earlier times, that the allocator has forgotten


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the GPU's allocator, or of the process without a GPU."""
    if device.type == "cuda":
        return max(_before.get(device, 0), torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak(device: torch.device) -> int:
    """Lets `peak_since` begin anew; `peak_memory` still knows of earlier peaks. Only on a GPU.

    Returns:
        Bytes that are allocated now.
    """
    _before[device] = peak_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_since(device: torch.device) -> int:
    """The most bytes that were allocated since `forget_peak`."""
    return torch.cuda.max_memory_allocated(device)
