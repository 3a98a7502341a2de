"""Starting a kernel again and again with little work for the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Launcher:
    """A kernel with its compile-time arguments.

    Triton looks at all arguments of every call to find out which variant of a kernel they need, which takes the host
    longer than many layers take the GPU. Here what distinguishes variants is compared in one go.

    Args:
        kernel: of `triton.jit`; its compile-time arguments come last.
        constants: its compile-time arguments, and options of the compiler.
    """

    def __init__(self, kernel: Any, **constants: Any) -> None:
        self.kernel, self.constants = kernel, constants
        self.values = [constants[name] for name in kernel.arg_names if name in constants]
        self.built: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Starts it on the current device, with tensors, descriptors of tensors, and numbers."""
        variant = (torch.cuda.current_device() if self.built else None, *map(_variant_of, arguments))
        built = self.built.get(variant)
        if built is not None:
            built[grid](*arguments, *self.values)
            return
        built = self.kernel[grid](*arguments, **self.constants)
        if built is not None:  # Triton's interpreter builds nothing
            self.built[torch.cuda.current_device(), *map(_variant_of, arguments)] = built


def _variant_of(argument: Any) -> tuple[Any, ...]:
    """What Triton specialises a kernel for."""
    if isinstance(argument, int):
        return argument % 16 == 0, argument == 1, argument >= 2**31
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument.base.dtype, tuple(argument.block_shape)
