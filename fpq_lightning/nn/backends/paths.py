"""The registry of arithmetic paths, and which one a packed layer takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fpq_lightning.nn.backends.hardware import Hardware, hardware_of
from fpq_lightning.nn.operands import Operands
from fpq_lightning.utils.registry import Registry

Arithmetic = Literal["native", "simulated"]
"""``native`` takes the best path of the device. ``simulated`` computes what the calibrated model computed, with
products in the type of the input."""


@dataclass(frozen=True)
class ArithmeticPath:
    """A way to compute a packed layer.

    Attributes:
        name: of the path.
        help: what it does, in one line.
        rank: a layer takes the path of the lowest rank among those that it can take.
        fits: whether the path can compute with operands. Depends on their formats, scales and shapes.
        available: whether the path runs on a device, for inputs of a type.
        run: computes the output of a layer from its input and operands.
        takes: whether the path takes an input. Checks what only a call shows, such as a missing batch dimension.
        low_bit: whether products read low-bit operands. Low-bit paths get no empty inputs and no inputs that need a
            gradient.
        max_rows: the most rows of the input for which the path is taken; None for no limit.
    """

    name: str
    help: str
    rank: int
    fits: Callable[[Operands], bool]
    available: Callable[[Hardware, torch.dtype], bool]
    run: Callable[[Tensor, Operands], Tensor]
    takes: Callable[[Tensor], bool] = lambda x: True
    low_bit: bool = True
    max_rows: int | None = None

    def takes_rows(self, elements: int, channels: int) -> bool:
        """Whether an input with this many elements and channels has no more than `max_rows` rows."""
        return self.max_rows is None or elements <= self.max_rows * channels


PATHS: Registry[ArithmeticPath] = Registry("arithmetic path")

Plan = tuple[str, ...]
"""Names of the paths that a layer can take, best first. Names, since `torch.compile` takes no objects as constants."""


def fitting_paths(operands: Operands) -> Plan:
    """Names of the paths that fit operands, best first. Computed once for each layer, outside of `torch.compile`."""
    return tuple(path.name for path in sorted(PATHS, key=lambda path: path.rank) if path.fits(operands))


def choose(fitting: Plan, hardware: Hardware, dtype: torch.dtype, arithmetic: Arithmetic) -> Plan:
    """The paths that a layer can take.

    Args:
        fitting: from `fitting_paths`.
        hardware: of the device that the layer runs on.
        dtype: of the input.
        arithmetic: that was chosen for the layer.
    """
    paths = [PATHS[name] for name in fitting]
    wanted = [path for path in paths if arithmetic == "native" or not path.low_bit]
    return tuple(path.name for path in wanted if path.available(hardware, dtype))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def plan_for(fitting: Plan, device: torch.device, dtype: torch.dtype, arithmetic: Arithmetic) -> Plan:
    """`choose` for a device; `torch.compile` takes the result as a constant."""
    return choose(fitting, hardware_of(device), dtype, arithmetic)


def run(plan: Plan, x: Tensor, operands: Operands) -> Tensor:
    """Runs a layer on the best path for an input.

    Raises:
        ValueError: if no path takes the input.
    """
    bias = operands.bias
    learns = (x.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled()
    elements = x.numel()
    low_bit, channels = elements and not learns, sum(operands.splits)
    for name in plan:
        path = PATHS[name]
        if (low_bit or not path.low_bit) and path.takes_rows(elements, channels) and path.takes(x):
            return path.run(x, operands)
    raise ValueError(f"no arithmetic path takes an input of shape {tuple(x.shape)} and type {x.dtype}")
