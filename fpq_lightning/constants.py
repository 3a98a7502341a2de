"""Tensors that are made once for a device and serve every layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keeps what a function makes: real tensors, even where it is called first while fake ones are traced."""

    @lru_cache(maxsize=64)
    @wraps(make)
    def made(*arguments: Any) -> Tensor:
        with _disable_current_modes():
            return make(*arguments)

    return made
