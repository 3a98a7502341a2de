"""Where the components of a pipeline are while its denoisers are calibrated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fpq_lightning.diffusion.pipelines import move_pipeline
from fpq_lightning.graph.chain import parts_of
from fpq_lightning.graph.offload import Offload
from fpq_lightning.graph.units import Unit


class Placement:
    """Moves a pipeline to the compute device: all of it, or with the blocks of its denoisers in host memory.

    Args:
        pipeline: in full precision.
        denoisers: of the pipeline, by name.
        blocks: of each denoiser the modules that are on the device only while they run; None moves whole denoisers.
        kept: bytes of blocks that stay on a GPU while the pipeline runs as a whole.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        denoisers: Mapping[str, nn.Module],
        blocks: Mapping[str, Sequence[nn.Module]] | None = None,
        kept: int = 0,
    ) -> None:
        self.pipeline = pipeline
        self.denoisers = denoisers
        self.kept = kept
        self._device = torch.device("cpu")
        self._offloads: dict[str, Offload] = {}
        self._slicing: list[Any] = []  # autoencoders that would else decode all images of a batch at once
        if blocks is not None:
            components = pipeline.components.values()
            self._slicing = [c for c in components if getattr(c, "use_slicing", None) is False]
        for autoencoder in self._slicing:
            autoencoder.enable_slicing()
        for name, some in (blocks or {}).items():
            self._offloads[name] = Offload(denoisers[name], some)

    def to(self, device: torch.device) -> None:
        """Makes the pipeline ready to run on a device."""
        self._device = device
        if not self._offloads:
            move_pipeline(self.pipeline, device)
        else:
            for offload in self._offloads.values():
                offload.place(device)
                offload.keep(self.kept // len(self._offloads) if device.type == "cuda" else 0)
            self._move_other_components(device)

    def calibrate(self, unit: Unit | None, name: str | None) -> None:
        """Keeps one unit on the device, and of the rest of the pipeline only its denoiser, if blocks are offloaded.

        Args:
            unit: None for none.
            name: of its denoiser.
        """
        if self._offloads:
            self._move_other_components(torch.device("cpu"))
        for of, offload in self._offloads.items():
            offload.place(self._device if of == name else torch.device("cpu"))
            offload.hold([] if unit is None or of != name else parts_of(unit.module))

    def release(self) -> None:
        """Leaves the pipeline like any other; one whose blocks were offloaded stays in host memory."""
        for offload in self._offloads.values():
            offload.remove()
        for autoencoder in self._slicing:
            autoencoder.disable_slicing()
        self._slicing = []
        if self._offloads:
            self._offloads = {}
            self.pipeline.to("cpu")

    def _move_other_components(self, device: torch.device) -> None:
        denoisers = list(self.denoisers.values())
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module) and not any(component is denoiser for denoiser in denoisers):
                component.to(device)
