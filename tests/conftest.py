"""What several test files share: the hypothesis profile and tiny networks of diffusers."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub: tests need no network, nor its retries

if find_spec("triton"):  # that its kernels are to be interpreted is read when they are imported
    os.environ["TRITON_INTERPRET"] = "1"
    kernels = ("column_rounding", "conv", "decode", "fake_quantize", "learned_rounding", "quantize", "skinny_gemm")
    for name in (*kernels, "weight_gemm"):
        import_module(f"fpq_lightning.kernels.{name}")
    del os.environ["TRITON_INTERPRET"]  # most tests are not to use them

settings.register_profile("fpq", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fpq")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Runs are not rehearsed, which takes a second each, unless a test is marked ``rehearsed``."""
    from fpq_lightning.training import rehearsal, run

    is_rehearsed = item.get_closest_marker("rehearsed") is not None
    run.rehearse = rehearsal.rehearse if is_rehearsed else lambda *args: None


MakeNetwork = Callable[..., tuple[nn.Module, dict[str, Any]]]


def _make_network(name: str, n: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    import diffusers  # takes seconds, and most files do without

    torch.manual_seed(0)
    timestep = torch.linspace(0, 900, n).long()
    text = torch.randn(n, 5, 12)
    unet = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    unet["attention_head_dim"] = 8
    model: nn.Module
    inputs: dict[str, Any]
    if name == "unet":
        model = diffusers.UNet2DModel(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **unet,
        )
        inputs = {"sample": torch.randn(n, 3, 8, 8), "timestep": timestep}
    elif name == "conditional_unet":
        model = diffusers.UNet2DConditionModel(
            cross_attention_dim=12,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **unet,
        )
        inputs = {"sample": torch.randn(n, 4, 8, 8), "timestep": timestep, "encoder_hidden_states": text}
    elif name == "dit":
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            sample_size=8,
            patch_size=2,
            norm_num_groups=4,
            num_embeds_ada_norm=10,
        )
        labels = torch.arange(n) % 10
        inputs = {"hidden_states": torch.randn(n, 4, 8, 8), "timestep": timestep, "class_labels": labels}
    elif name == "flux":
        model = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=12,
            axes_dims_rope=(4, 4, 8),
        )
        inputs = {"hidden_states": torch.randn(n, 4, 4), "encoder_hidden_states": text, "timestep": timestep / 1000}
        inputs |= {"pooled_projections": torch.randn(n, 12), "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(5, 3)}
    else:
        raise ValueError(name)
    return model.eval().requires_grad_(False), inputs


@pytest.fixture
def make_network() -> MakeNetwork:
    """Makes a network with every kind of block of its class, and its keyword arguments for `n` samples.

    Names are ``unet``, ``conditional_unet``, ``dit`` and ``flux``. What flux calls ``img_ids`` and ``txt_ids`` is the
    same for all samples.
    """
    return _make_network
