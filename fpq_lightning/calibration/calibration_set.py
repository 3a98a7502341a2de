"""A calibration set: what the denoiser is called with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fpq_lightning.graph.tree import nest


@dataclass
class CalibrationSet:
    """The arguments of many calls of the denoiser.

    Attributes:
        inputs: keyword arguments that differ from sample to sample, `[n, ...]`; nested ones by path, such as
            ``added_cond_kwargs/time_ids``.
        weights: how much an error on each sample matters, float32 `[n]`, with mean 1.
        constants: the other keyword arguments, by path.
    """

    inputs: dict[str, Tensor]
    weights: Tensor
    constants: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.weights)

    def batch(self, rows: slice | Tensor, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the denoiser for some of the samples."""
        inputs = {name: value[rows].to(device) for name, value in self.inputs.items()}
        constants = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.constants.items()}
        return nest({**inputs, **constants})

    def select(self, rows: Tensor) -> CalibrationSet:
        """A set of some of the samples."""
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        return CalibrationSet(inputs, self.weights[rows], self.constants)
