"""Blocks in host memory, on the compute device only while they run."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fpq_lightning.graph.units import layer_count
from fpq_lightning.utils.pinned_memory import pin, unpin


class Offload:
    """Keeps the blocks of a network in host memory; a block is on the device during its forward, or while it is held.

    What lies between the blocks, and layers that stand alone, stays on the device. A part of a block that runs without
    it (DiT embeds the timestep once more with its first block's layers) is there while it runs.

    Args:
        model: the network.
        blocks: modules of it that do not hold each other.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        self.model = model.to("cpu")
        self.blocks = [block for block in blocks if layer_count(block) > 1]
        self.device = torch.device("cpu")
        # Weights do not change: what goes back to host memory need not be copied.
        self._home = {id(p): p.data for block in self.blocks for p in block.parameters()}
        self._pinned: list[Tensor] = []
        self._held: list[nn.Module] = []
        self._running: list[nn.Module] = []
        self._handles: list[Any] = []
        for block in self.blocks:
            self._handles.append(block.register_forward_pre_hook(self._enter))
            self._handles.append(block.register_forward_hook(self._leave, always_call=True))
            for part in (m for m in block.modules() if m is not block and any(True for _ in m.parameters(False))):
                self._handles.append(part.register_forward_pre_hook(partial(self._enter_part, block)))
                self._handles.append(part.register_forward_hook(partial(self._leave_part, block), always_call=True))

    def place(self, device: torch.device) -> None:
        """Moves what is not in a block to the device that blocks go to from now on."""
        self.device = device
        if device.type == "cuda" and not self._pinned:
            for block in self.blocks:
                if not self._is_there(block):
                    self._pin(block)
        inside = {id(x) for block in self.blocks for x in (*block.parameters(), *block.buffers())}
        for x in (*self.model.parameters(), *self.model.buffers()):
            if id(x) not in inside:
                x.data = x.data.to(device)

    def hold(self, blocks: Iterable[nn.Module]) -> None:
        """Keeps blocks on the device until others, or none, are held; of a larger module those that it holds."""
        inside = {module for block in blocks for module in block.modules()}
        wanted = [block for block in self.blocks if block in inside]
        for block in self._held:
            if block not in wanted:
                self._unload(block)
        for block in wanted:
            block.to(self.device)
        self._held = wanted

    def remove(self) -> None:
        """Leaves the network in host memory, as any other."""
        for handle in self._handles:
            handle.remove()
        self.hold([])
        self.model.to("cpu")
        for memory in self._pinned:
            unpin(memory)
        self._pinned = []

    def _pin(self, block: nn.Module) -> None:
        """Puts the weights of a block side by side into memory that the GPU reads at full speed."""
        by_type: dict[torch.dtype, list[nn.Parameter]] = {}
        for p in block.parameters():
            if p.is_contiguous():
                by_type.setdefault(p.dtype, []).append(p)
        for dtype, parameters in by_type.items():
            sizes = [p.numel() for p in parameters]
            memory = torch.empty(sum(sizes), dtype=dtype)
            if not pin(memory):
                continue
            self._pinned.append(memory)
            for p, place in zip(parameters, memory.split(sizes), strict=True):
                home = place.view_as(p)
                home.copy_(self._home[id(p)])
                p.data = self._home[id(p)] = home

    def _is_there(self, block: nn.Module) -> bool:
        return block in self._held or block in self._running

    def _enter(self, block: nn.Module, args: Any) -> None:
        if block not in self._held and "forward" not in vars(block):  # a stub needs no weights
            block.to(self.device)
            self._running.append(block)

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        if block in self._running:
            self._running.remove(block)
            self._unload(block)

    def _enter_part(self, block: nn.Module, part: nn.Module, args: Any) -> None:
        if not self._is_there(block):
            part.to(self.device)

    def _leave_part(self, block: nn.Module, part: nn.Module, args: Any, output: Any) -> None:
        if not self._is_there(block):
            self._unload(part)

    def _unload(self, module: nn.Module) -> None:
        for p in module.parameters():
            if id(p) in self._home:
                p.data = self._home[id(p)]
        module.to("cpu")  # what it has got since: quantizers and codes
