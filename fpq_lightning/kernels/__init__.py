"""Triton kernels for NVIDIA GPUs; everything they do is also there in plain torch."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def are_for(x: Tensor) -> bool:
    """Whether the kernels run where a tensor is; ``FPQ_KERNELS=0`` turns them off, to compare with plain torch."""
    if os.environ.get("FPQ_KERNELS") == "0" or not x.numel() or not _has_triton():
        return False
    if x.is_cuda:
        return x.get_device() == torch.cuda.current_device()
    return os.environ.get("TRITON_INTERPRET") == "1"
