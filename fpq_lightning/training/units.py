"""The units of a denoiser, found with samples of its calibration set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.graph.trace import trace_units
from fpq_lightning.graph.units import Unit


class Found(NamedTuple):
    """What `find_units` finds.

    Attributes:
        units: in execution order.
        splits: for every layer that reads a concatenation the sizes of its pieces.
        left: why further layers stay in full precision, by name.
    """

    units: list[Unit]
    splits: dict[str, tuple]
    left: dict[str, str]


def find_units(
    denoiser: nn.Module, candidates: Sequence[Unit], calibration: CalibrationSet, device: torch.device
) -> Found:
    """Traces a denoiser with some of its samples.

    Args:
        denoiser: in full precision.
        candidates: of `discover_units`.
        calibration: a few samples are enough.
        device: of the denoiser.
    """
    alike = calibration.largest_group()
    n = len(alike)
    # Batches of different sizes, and others of one size, show which modules are given whole samples.
    rows = [alike[places % n] for places in (torch.arange(2), torch.arange(2, 5), torch.arange(n - 2, n))]
    others: list[tuple[int | None, dict]] = [(len(places), calibration.batch(places, device)) for places in rows]
    # Others yet may not run the same modules, or have other shapes.
    others += [(None, calibration.batch(slice(i, i + 1), device)) for i in calibration.extremes()]
    planned = {name: unit for unit in candidates for name in unit.layers}
    units, splits = trace_units(denoiser, list(candidates), calibration.batch(slice(0, 1), device), others)
    ran = {name for unit in units for name in unit.layers}
    never = "layers that are not called"
    return Found(units, splits, {name: unit.left or never for name, unit in planned.items() if name not in ran})
