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
"""``native`` takes the best path that a device has; ``simulated`` is equal to the calibrated model's, to the bits of
products in the type of the input."""


@dataclass(frozen=True)
class ArithmeticPath:
    """A way to compute a packed layer.

    Attributes:
        name: in listings.
        help: one line.
        rank: of all paths that a layer can take, the one of the lowest rank is taken.
        fits: whether it can compute with operands, by their formats, scales and shapes.
        available: whether it runs on a device, for inputs of a type.
        run: the layer's result for an input.
        takes: whether it takes an input that `fits` and `available` could not know, such as one without a batch.
        low_bit: whether products read low-bit operands. Such have no gradient, and take no empty input.
        max_rows: rows of the input up to which it is taken; None for any number.
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
        """Whether it takes an input of so many elements and channels."""
        return self.max_rows is None or elements <= self.max_rows * channels


PATHS: Registry[ArithmeticPath] = Registry("arithmetic path")

Plan = tuple[str, ...]
"""Names of the paths that a layer may take, best first; names, since compilers take no objects for constants."""


def fitting_paths(operands: Operands) -> Plan:
    """Names of the paths that operands fit, best first. Looked at once: compilers need not follow."""
    return tuple(path.name for path in sorted(PATHS, key=lambda path: path.rank) if path.fits(operands))


def choose(fitting: Plan, hardware: Hardware, dtype: torch.dtype, arithmetic: Arithmetic) -> Plan:
    """The paths that a layer may take.

    Args:
        fitting: by `fitting_paths`.
        hardware: where it is to run.
        dtype: of the input.
        arithmetic: what is wished for.
    """
    paths = [PATHS[name] for name in fitting]
    wanted = [path for path in paths if arithmetic == "native" or not path.low_bit]
    return tuple(path.name for path in wanted if path.available(hardware, dtype))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def plan_for(fitting: Plan, device: torch.device, dtype: torch.dtype, arithmetic: Arithmetic) -> Plan:
    """`choose` on a device; nothing that a compiler traces."""
    return choose(fitting, hardware_of(device), dtype, arithmetic)


def run(plan: Plan, x: Tensor, operands: Operands) -> Tensor:
    """Runs a layer on the best path for an input."""
    bias = operands.bias
    learns = (x.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled()
    elements = x.numel()
    low_bit, channels = elements and not learns, sum(operands.splits)
    for name in plan:
        path = PATHS[name]
        if (low_bit or not path.low_bit) and path.takes_rows(elements, channels) and path.takes(x):
            return path.run(x, operands)
    raise ValueError(f"no arithmetic path takes an input of shape {tuple(x.shape)} and type {x.dtype}")
