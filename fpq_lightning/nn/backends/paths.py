"""The path of a packed layer: which arithmetic it runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from fpq_lightning.kernels.availability import kernels_run_for
from fpq_lightning.nn.backends import fp8, fp8_conv, weight_only
from fpq_lightning.nn.backends.hardware import Hardware, hardware_of

if TYPE_CHECKING:
    from fpq_lightning.nn.packed import PackedLayer

Arithmetic = Literal["native", "simulated"]
"""``native`` takes the best path that a device has; ``simulated`` is equal to the calibrated model's, to the bits of
products in the type of the input."""

Path = Literal["fp8", "fp8_conv", "weight_only", "decode"]
"""``fp8``, ``fp8_conv``: E4M3 by E4M3 on tensor cores. ``weight_only``: codes are decoded within the product.
``decode``: the weight is decoded for the call."""


class Plan(NamedTuple):
    """The path of a layer on inputs of few rows (up to `weight_only.MAX_ROWS`), and of many."""

    few: Path
    many: Path


def low_bit_paths(layer: PackedLayer) -> tuple[Path, ...]:
    """The low-bit paths that the formats and scales of a layer allow. Looked at once: compilers need not follow."""
    allowed: dict[Path, bool] = {
        "fp8": fp8.fits(layer), "fp8_conv": fp8_conv.fits(layer), "weight_only": weight_only.fits(layer)
    }  # fmt: skip
    return tuple(path for path, fits in allowed.items() if fits)


def choose(allowed: tuple[Path, ...], hardware: Hardware, dtype: torch.dtype, arithmetic: Arithmetic) -> Plan:
    """The paths of a layer on inputs of a type. Those in float32 ask for its precision, so the weight is decoded.

    Args:
        allowed: by `low_bit_paths`.
        hardware: where it is to run.
        dtype: of the input.
        arithmetic: what is wished for.
    """
    if arithmetic == "simulated" or dtype not in (torch.float16, torch.bfloat16):
        return Plan("decode", "decode")
    runs: dict[Path, bool] = {
        "fp8": hardware.multiplies_fp8 and dtype == torch.bfloat16,
        "fp8_conv": hardware.convolves_fp8 and dtype == torch.bfloat16,
        "weight_only": hardware.kernels,
    }
    possible = [path for path in allowed if runs[path]]
    many: Path = next((path for path in possible if path != "weight_only"), "decode")
    return Plan("weight_only" if "weight_only" in possible else many, many)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def plan_for(allowed: tuple[Path, ...], device: torch.device, dtype: torch.dtype, arithmetic: Arithmetic) -> Plan:
    """`choose` on a device; nothing that a compiler traces."""
    return choose(allowed, hardware_of(device), dtype, arithmetic)


def is_few(layer: PackedLayer, elements: int) -> bool:
    """Whether an input of so many elements has few rows."""
    return elements <= weight_only.MAX_ROWS * layer.shape[1]


def run(layer: PackedLayer, x: Tensor, plan: Plan) -> Tensor:
    """Runs a layer as planned; decoded, where a gradient is wanted, which low-bit products do not have."""
    path = plan.few if is_few(layer, x.numel()) else plan.many
    if path == "fp8_conv" and x.ndim != 4:  # an image without its batch
        path = "decode"
    if path in ("weight_only", "fp8_conv") and not kernels_run_for(x):  # another device is the current one
        path = plan.many if path == "weight_only" else "decode"
    learns = x.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
    if not x.numel() or (learns and torch.is_grad_enabled()):
        path = "decode"
    if path == "fp8":
        return fp8.run(layer, x)
    if path == "fp8_conv":
        return fp8_conv.run(layer, x)
    return weight_only.run(layer, x) if path == "weight_only" else layer.simulate(x)
