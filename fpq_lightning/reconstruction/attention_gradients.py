"""Gradients of attention in one memory layout.

PyTorch keeps the plans of cuDNN's attention by the layouts of queries, keys and values, but builds those of the
backward pass for the layout of the output's gradient, too (mended in pytorch#191576). A block that concatenates the
output with something else gets its gradient as a slice, which the plan of another block then reads with the wrong
strides: wrong gradients, or memory that is not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the usual name
from torch.overrides import TorchFunctionMode


class GradientsLikeOutputs(TorchFunctionMode):
    """Gives the backward pass of attention gradients that lie in memory as its output does."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and out.requires_grad:
            strides = out.stride()
            out.register_hook(lambda gradient: _laid_out(gradient, strides))
        return out


def _laid_out(gradient: Tensor, strides: tuple[int, ...]) -> Tensor:
    if gradient.stride() == strides:
        return gradient
    return torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(gradient)
