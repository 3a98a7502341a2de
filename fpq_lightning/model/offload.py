"""Blocks in host memory, on the compute device only while they run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fpq_lightning.model.blocks import layer_count


class Offload:
    """Keeps the blocks of a network in host memory; a block is on the device during its forward, or while it is held.

    What lies between the blocks, and layers that stand alone, stays on the device.

    Args:
        model: the network, in host memory.
        blocks: modules of it that do not hold each other.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        self.model = model
        self.blocks = [block for block in blocks if layer_count(block) > 1]
        self.device = torch.device("cpu")
        # Weights do not change: what goes back to host memory need not be copied.
        self._home = {id(x): x.data for block in self.blocks for x in _tensors(block)}
        self._held: list[nn.Module] = []
        for block in self.blocks:
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave, always_call=True)

    def place(self, device: torch.device) -> None:
        """Moves what is not in a block to the device that blocks go to from now on."""
        self.device = device
        for x in _tensors(self.model):
            if id(x) not in self._home:
                x.data = x.data.to(device)

    def hold(self, blocks: Iterable[nn.Module]) -> None:
        """Keeps blocks on the device until others, or none, are held."""
        wanted = [block for block in blocks if block in self.blocks]
        for block in self._held:
            if block not in wanted:
                self._unload(block)
        for block in wanted:
            block.to(self.device)
        self._held = wanted

    def _enter(self, block: nn.Module, args: Any) -> None:
        if self._runs(block):
            block.to(self.device)

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        if self._runs(block):
            self._unload(block)

    def _runs(self, block: nn.Module) -> bool:
        return block not in self._held and "forward" not in vars(block)  # a stub needs no weights

    def _unload(self, block: nn.Module) -> None:
        for x in _tensors(block):
            if id(x) in self._home:
                x.data = self._home[id(x)]
        block.to("cpu")  # what it has got since: quantizers and codes


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
