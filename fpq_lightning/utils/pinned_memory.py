"""Page-locked host memory, which a GPU reads and writes at full speed."""

from __future__ import annotations

import warnings
from contextlib import suppress

import torch
from torch import Tensor

_SHARED_BYTES = 2**25  # smaller arrays may share a page with others
_works = True


def pin(tensor: Tensor) -> bool:
    """Locks the memory of a large contiguous tensor in place; torch's own pinned memory takes up to twice the size.

    Returns:
        Whether it is locked. Then call `unpin` before the tensor is freed.
    """
    global _works
    size = tensor.numel() * tensor.element_size()
    if size <= _SHARED_BYTES or not torch.cuda.is_available() or not _works:
        return False
    if int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size, 0)) == 0:
        return True
    with suppress(RuntimeError):  # otherwise the next CUDA call would report the error
        torch.zeros(1, device="cuda")
    _works = False
    warnings.warn("host memory cannot be page-locked here: copies from and to the GPU are slower", stacklevel=2)
    return False


def unpin(tensor: Tensor) -> None:
    """Unlocks what `pin` locked, after all copies from and to it have ended."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
