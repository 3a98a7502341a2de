"""Page-locked host memory, which a GPU reads and writes at the full speed of its link."""

from __future__ import annotations

import warnings
from contextlib import suppress

import torch
from torch import Tensor

_SHARED_BYTES = 2**25  # up to here an array may share a page with another
_works = True


def pin(tensor: Tensor) -> bool:
    """Locks the memory of a large contiguous tensor where it lies; torch's own pinned memory is up to twice the size.

    Returns:
        Whether it is locked, so that `unpin` is due before the tensor goes.
    """
    global _works
    size = tensor.numel() * tensor.element_size()
    if size <= _SHARED_BYTES or not torch.cuda.is_available() or not _works:
        return False
    if int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size, 0)) == 0:
        return True
    with suppress(RuntimeError):  # CUDA would report the error with whatever comes next
        torch.zeros(1, device="cuda")
    _works = False
    warnings.warn("host memory cannot be page-locked here: copies from and to the GPU are slower", stacklevel=2)
    return False


def unpin(tensor: Tensor) -> None:
    """Unlocks what `pin` locked, once no copy from or to it is under way."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
