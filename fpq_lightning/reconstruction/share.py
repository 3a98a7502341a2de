"""Work on layers that the processes of a run divide among them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fpq_lightning.nn.calibrated import LayerQuantization
from fpq_lightning.utils import distributed


def share(found: dict[str, LayerQuantization], device: torch.device) -> dict[str, LayerQuantization]:
    """What all processes found together, by the name of the layer."""
    if distributed.world_size() == 1:
        return found
    states = {name: tree_map_only(Tensor, Tensor.cpu, quantization.to_state()) for name, quantization in found.items()}
    return {
        name: LayerQuantization.from_state(state, device)
        for part in distributed.all_gather_objects(states)
        for name, state in part.items()
    }
