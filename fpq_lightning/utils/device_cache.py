"""Constant tensors, made once for each device and shared by all layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def cached_tensor(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Caches the tensors that a function makes; they are real even if a compiler traces the first call."""

    @lru_cache(maxsize=64)
    @wraps(make)
    def made(*arguments: Any) -> Tensor:
        with _disable_current_modes():
            return make(*arguments)

    return made
