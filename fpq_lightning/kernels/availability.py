"""Whether the Triton kernels run where a tensor is."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from fpq_lightning.formats.numbers import Spacing


@lru_cache(maxsize=1)
def _triton_works() -> bool:
    """Whether Triton is installed and can build kernels, which takes a C compiler."""
    if find_spec("triton") is None:
        return False
    try:
        from fpq_lightning.kernels.fake_quantize import fake_quantize  # needs Triton

        one = torch.ones(1, device="cuda" if torch.cuda.is_available() else "cpu")
        fake_quantize(one, one, None, Spacing(-1.0, 1.0, 1.0, 0.0)).item()
    except Exception as error:  # whatever a compiler may raise
        reason = " ".join(str(error).split())[:150]
        warnings.warn(f"Triton cannot run here ({reason}): using plain torch, which is slower", stacklevel=2)
        return False
    return True


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def kernels_run_on(device: torch.device) -> bool:
    """Whether the kernels run on a device; ``FPQ_KERNELS=0`` turns them off, to compare with plain torch."""
    if os.environ.get("FPQ_KERNELS") == "0":
        return False
    if device.type == "cuda":
        return device.index in (None, torch.cuda.current_device()) and _triton_works()
    return os.environ.get("TRITON_INTERPRET") == "1" and _triton_works()


def kernels_run_for(x: Tensor) -> bool:
    """Whether the kernels run where a tensor is, and it has elements."""
    return x.numel() > 0 and kernels_run_on(x.device)
