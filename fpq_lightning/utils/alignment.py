"""Tensors of a CPU that begin where torch lets its own begin."""

from __future__ import annotations

from torch import nn

_ALIGNMENT = 64
"""Bytes that the addresses of tensors which torch allocates are multiples of."""


def align(module: nn.Module) -> None:
    """Copies parameters and buffers on the CPU that begin elsewhere, as those of files do, which are mapped to memory.

    Products of a single row have other last bits there. Codes need no copy: they are decoded to tensors of torch.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        numbers = tensor.is_floating_point() and tensor.itemsize > 1  # type: ignore[operator]
        if numbers and tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
