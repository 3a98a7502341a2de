"""Triton kernels for NVIDIA GPUs; everything they do is also there in plain torch."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fpq_lightning.formats import Spacing

if TYPE_CHECKING:
    from fpq_lightning.kernels import fake_quantize as fake_quantize  # there as soon as `are_for` says so


@lru_cache(maxsize=1)
def _work() -> bool:
    """Whether Triton is there and its kernels can be built (it needs a C compiler)."""
    if find_spec("triton") is None:
        return False
    try:
        from fpq_lightning.kernels import fake_quantize  # needs Triton

        one = torch.ones(1, device="cuda" if torch.cuda.is_available() else "cpu")
        fake_quantize.fake_quantize(one, one, None, Spacing(-1.0, 1.0, 1.0, 0.0)).item()
    except Exception as error:  # whatever a compiler may raise
        reason = " ".join(str(error).split())[:150]
        warnings.warn(f"Triton cannot run here ({reason}): going on in plain torch, slower", stacklevel=2)
        return False
    return True


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def are_for_device(device: torch.device) -> bool:
    """Whether the kernels run on a device; ``FPQ_KERNELS=0`` turns them off, to compare with plain torch."""
    if os.environ.get("FPQ_KERNELS") == "0":
        return False
    if device.type == "cuda":
        return device.index in (None, torch.cuda.current_device()) and _work()
    return os.environ.get("TRITON_INTERPRET") == "1" and _work()


def are_for(x: Tensor) -> bool:
    """Whether the kernels run where a tensor is, and there is something to do."""
    return x.numel() > 0 and are_for_device(x.device)
