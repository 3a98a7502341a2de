"""Where the components of a pipeline are while its denoiser is calibrated."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fpq_lightning.diffusion.pipelines import denoiser_name, move_pipeline
from fpq_lightning.graph.chain import parts_of
from fpq_lightning.graph.offload import Offload
from fpq_lightning.graph.units import Unit
from fpq_lightning.utils.alignment import align


class Placement:
    """Moves a pipeline to the compute device: all of it, or with the blocks of its denoiser in host memory.

    Args:
        pipeline: in full precision.
        blocks: modules of its denoiser that are on the device only while they run; None moves the denoiser as a whole.
    """

    def __init__(self, pipeline: DiffusionPipeline, blocks: list[nn.Module] | None = None) -> None:
        self.pipeline = pipeline
        self.denoiser: nn.Module = getattr(pipeline, denoiser_name(pipeline))
        if blocks is not None:
            align(self.denoiser)  # now, for blocks go back to where they are
        self._offload = None if blocks is None else Offload(self.denoiser, blocks)

    def to(self, device: torch.device) -> None:
        """Makes the pipeline ready to run on a device."""
        if self._offload is None:
            move_pipeline(self.pipeline, device)
        else:
            self._offload.place(device)
            self._move_other_components(device)

    def calibrate(self, unit: Unit | None) -> None:
        """Keeps one unit on the device, and of the rest of the pipeline only the denoiser, if blocks are offloaded."""
        if self._offload is not None:
            self._move_other_components(torch.device("cpu"))
            self._offload.hold([] if unit is None else parts_of(unit.module))

    def release(self) -> None:
        """Leaves the pipeline like any other; one whose blocks were offloaded stays in host memory."""
        if self._offload is not None:
            self._offload.remove()
            self._offload = None
            self.pipeline.to("cpu")

    def _move_other_components(self, device: torch.device) -> None:
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module) and component is not self.denoiser:
                component.to(device)
