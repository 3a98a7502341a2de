"""Patches times rows of the weight are the layer's output, whatever the layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fpq_lightning.nn.calibrated import QuantizedLayer
from fpq_lightning.nn.convert import make_quantized
from fpq_lightning.nn.patches import patches
from fpq_lightning.quantization.quantizer import Granularity

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (3, 5, 6)),
    "linear without tokens": (nn.Linear(6, 4), (3, 6)),
    "linear of images": (nn.Linear(6, 4), (3, 2, 5, 6)),
    "conv": (nn.Conv2d(6, 4, 3, padding=1), (3, 6, 5, 7)),
    "stride and dilation": (nn.Conv2d(6, 4, 3, stride=2, padding=2, dilation=2), (3, 6, 9, 8)),
    "groups": (nn.Conv2d(6, 4, (1, 3), padding=(0, 1), groups=2), (3, 6, 5, 7)),
    "depthwise": (nn.Conv1d(6, 6, 3, groups=6), (3, 6, 9)),
    "reflected": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (3, 6, 5, 7)),
    "same": (nn.Conv2d(6, 4, (2, 3), padding="same"), (3, 6, 5, 7)),
    "video": (nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1)), (3, 2, 2, 5, 7)),
}


def prepared(name: str) -> tuple[QuantizedLayer, Tensor]:
    plain, shape = LAYERS[name]
    layer = make_quantized(copy.deepcopy(plain), Granularity("channel"))
    return layer, torch.randn(shape, generator=torch.Generator().manual_seed(0))


def outputs(layer: QuantizedLayer, found: Tensor) -> Tensor:
    """``[batch, places, out]``, without bias."""
    groups = found.shape[2]
    rows = layer.weight.detach().flatten(1).unflatten(0, (groups, -1))
    return torch.einsum("bpgn,gon->bpgo", found, rows).flatten(2)


def expected(layer: QuantizedLayer, x: Tensor) -> Tensor:
    found = layer.operate(x, layer.weight, None).detach()
    return (found if isinstance(layer, nn.Linear) else found.flatten(2).mT).reshape(len(x), -1, len(layer.weight))


@pytest.mark.parametrize("name", LAYERS)
def test_all_patches_give_the_output(name: str) -> None:
    layer, x = prepared(name)
    found = patches(layer, x, torch.rand(len(x), 1000))
    assert torch.allclose(outputs(layer, found), expected(layer, x), atol=1e-5)


@pytest.mark.parametrize("name", [name for name, (_, shape) in LAYERS.items() if len(shape) > 2])
def test_drawn_patches_are_places_of_their_own_spread_over_each_element(name: str) -> None:
    layer, x = prepared(name)
    jitter = torch.rand(len(x), 4, generator=torch.Generator().manual_seed(1))
    found, every = outputs(layer, patches(layer, x, jitter)), expected(layer, x)
    assert found.shape == (len(x), 4, len(layer.weight))
    for some, all_places in zip(found, every, strict=True):
        places = [(row - all_places).abs().sum(1).argmin().item() for row in some]
        assert all((row - all_places[place]).abs().max() < 1e-5 for row, place in zip(some, places, strict=True))
        n = len(all_places)
        assert all(abs(place - (i + 0.5) * n / 4) <= n / 8 + 1 for i, place in enumerate(places))
