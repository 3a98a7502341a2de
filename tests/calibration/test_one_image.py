"""Axes of calls for one image each: right if a batch of two gives what each image gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fpq_lightning.calibration.axes import Axis
from fpq_lightning.calibration.one_image import find_axes_of_one
from fpq_lightning.calibration.recorder import Call


class Network(nn.Module):
    """Rows, a table that looks like one of them, and what all images share."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        self.way, self.layer = way, nn.Linear(4, 4)

    def forward(self, x: Tensor, table: Tensor, extras: dict[str, Any], scale: float) -> Tensor:
        found = self.layer(x) * scale + extras["text"]
        if self.way == "frames":
            found = found + x.unflatten(0, (-1, 3)).flip(1).flatten(0, 1)  # an image is three rows
        elif self.way == "mixed":
            found = found + x.mean(0)
        elif self.way == "alone":
            assert len(x) == 1
        return found + table[0]


def call_of(network: Network, seed: int, rows: int, scale: float = 2.0) -> Call:
    draw, constant = torch.Generator().manual_seed(seed), torch.linspace(0, 1, 4)
    arguments: dict[str, Any] = {
        "x": torch.randn(rows, 4, generator=draw),
        "table": constant.expand(rows, 4),
        "extras": {"text": torch.randn(rows, 4, generator=draw), "size": (8, 8)},
        "scale": scale,
    }
    with torch.no_grad():
        given = {**arguments, "extras": {"text": arguments["extras"]["text"]}}
        return Call(arguments, [network(**given)])


class Sized(Network):
    def forward(self, x: Tensor, table: Tensor, extras: dict[str, Any], scale: float) -> Tensor:
        if self.way == "one table":
            assert len(table) == 1
        return super().forward(x, table, extras, scale)


@pytest.mark.parametrize(
    ("way", "rows", "folded", "paths"),
    [
        ("", 1, 1, {"x", "table", "extras/text"}),
        ("", 2, 1, {"x", "table", "extras/text"}),  # guidance
        ("frames", 3, 3, {"x", "table", "extras/text"}),
        ("one table", 1, 1, {"x", "extras/text"}),
    ],
)
def test_rows_of_an_image_are_told_by_what_the_network_makes_of_two(
    way: str, rows: int, folded: int, paths: set[str]
) -> None:
    network = Sized(way)
    axes = find_axes_of_one(network, [call_of(network, 1, rows)], [call_of(network, 2, rows)])
    assert axes == dict.fromkeys(paths, Axis(folded=folded))


@pytest.mark.parametrize(("way", "scales"), [("mixed", (2.0, 2.0)), ("alone", (2.0, 2.0)), ("", (2.0, 3.0))])
def test_networks_that_do_not_take_two_images_are_refused(way: str, scales: tuple[float, float]) -> None:
    network = Network(way)
    calls = [[call_of(network, seed, 1, scale)] for seed, scale in enumerate(scales)]
    with pytest.raises(ValueError, match="no part of the arguments"):
        find_axes_of_one(network, *calls)


def test_images_that_take_another_number_of_calls_are_refused() -> None:
    network = Network()
    call = call_of(network, 1, 1)
    with pytest.raises(ValueError, match="not made with as many calls"):
        find_axes_of_one(network, [call], [call, call])
