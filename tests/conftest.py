"""What several test files share: the hypothesis profile and tiny networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from diffusers import UNet2DModel

settings.register_profile("fpq", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fpq")


@pytest.fixture
def unet() -> UNet2DModel:
    """A UNet with every kind of block: ResNets with and without shortcut, attention, down- and upsampling, skips."""
    from diffusers import UNet2DModel  # takes seconds to import, which few files need

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
