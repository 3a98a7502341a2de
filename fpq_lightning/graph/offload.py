"""Blocks in host memory, on the compute device only while they run."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fpq_lightning.graph.units import layer_count
from fpq_lightning.utils.alignment import align
from fpq_lightning.utils.staging import Staging


class Offload:
    """Keeps the blocks of a network in host memory; a block is on the device during its forward, or while it is held.

    Weights stay where they were loaded to, which may be files that are mapped to memory.
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
        self._home: dict[int, Tensor] = {}  # of weights on the device; they do not change, so nothing is copied back
        self._staging: Staging | None = None
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
        if device.type == "cpu":
            align(self.model)
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
            self._load(block)
        self._held = wanted

    def keep(self, size: int) -> None:
        """Holds the first blocks, too, as far as all that are held take no more than some bytes."""
        left = size - sum(_bytes(block) for block in self._held)
        for block in self.blocks:
            if block not in self._held:
                left -= _bytes(block)
                if left < 0:
                    break
                self._load(block)
                self._held.append(block)

    def remove(self) -> None:
        """Leaves the network in host memory, as any other."""
        for handle in self._handles:
            handle.remove()
        self.hold([])
        self.model.to("cpu")
        if self._staging is not None:
            self._staging.close()

    def _is_there(self, block: nn.Module) -> bool:
        return block in self._held or block in self._running

    def _enter(self, block: nn.Module, args: Any) -> None:
        if block not in self._held and "forward" not in vars(block):  # a stub needs no weights
            self._load(block)
            self._running.append(block)

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        if block in self._running:
            self._running.remove(block)
            self._unload(block)

    def _enter_part(self, block: nn.Module, part: nn.Module, args: Any) -> None:
        if not self._is_there(block):
            self._load(part)

    def _leave_part(self, block: nn.Module, part: nn.Module, args: Any, output: Any) -> None:
        if not self._is_there(block):
            self._unload(part)

    def _load(self, module: nn.Module) -> None:
        weights = [p for p in module.parameters() if id(p) not in self._home]
        self._home |= {id(p): p.data for p in weights}
        if self.device.type == "cuda":
            self._staging = self._staging or Staging(self.device)
            plain = [p for p in weights if p.is_contiguous()]
            for p, copy in zip(plain, self._staging.copies(plain), strict=True):
                p.data = copy
        module.to(self.device)

    def _unload(self, module: nn.Module) -> None:
        for p in module.parameters():
            p.data = self._home.pop(id(p), p.data)
        module.to("cpu")  # what it has got since: quantizers and codes


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
