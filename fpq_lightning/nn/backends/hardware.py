"""What a device can multiply."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fpq_lightning.kernels.availability import kernels_run_on

_FP8 = (8, 9)  # Ada
_COPY_ENGINE = (9, 0)  # Hopper


@dataclass(frozen=True)
class Hardware:
    """What decides on which path a layer runs.

    Attributes:
        capability: compute capability of an NVIDIA GPU, None for another device.
        kernels: whether Triton kernels run there.
    """

    capability: tuple[int, int] | None = None
    kernels: bool = False

    @property
    def multiplies_fp8(self) -> bool:
        """Whether it has tensor cores for E4M3."""
        return self.capability is not None and self.capability >= _FP8

    @property
    def convolves_fp8(self) -> bool:
        """Whether our convolutions of E4M3 are to run there, whose rectangles of pixels the copy engine fetches."""
        return self.kernels and self.capability is not None and self.capability >= _COPY_ENGINE


def hardware_of(device: torch.device) -> Hardware:
    """What a device can do."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.cuda else None
    return Hardware(capability, kernels_run_on(device))
