"""Counts of what is quantized against counts by hand."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
from torch import Tensor, nn

from fpq_lightning.formats.numbers import parse_format
from fpq_lightning.nn.calibrated import LayerQuantization
from fpq_lightning.nn.convert import make_quantized, pack_layer
from fpq_lightning.nn.coverage import Coverage, coverage
from fpq_lightning.quantization.quantizer import Granularity, Quantizer


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Kept(nn.Linear):
    """Says more than a Linear layer, and computes the same."""


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.kept, self.skipped = nn.Linear(4, 6), Kept(6, 6), nn.Linear(6, 2)
        self.conv1d, self.conv3d = nn.Conv1d(4, 2, 3), nn.Conv3d(4, 2, (1, 3, 3))
        self.up, self.doubled = nn.ConvTranspose2d(3, 5, 2), Doubled(3, 3)
        self.scaled = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        self.words, self.norm = nn.Embedding(7, 3), nn.LayerNorm(5)
        self.experts, self.table = nn.Parameter(torch.zeros(3, 4, 5)), nn.Parameter(torch.zeros(1, 6, 4))


QUANTIZED = ("proj", "kept", "conv1d", "conv3d")
SIZE = 24 + 36 + 24 + 72


def test_every_parameter_is_quantized_or_named_by_kind_and_biases_of_layers_are_not_counted() -> None:
    found = coverage(Everything(), QUANTIZED, {"skipped": "layers that are not called"})
    kinds = {kept.kind: (kept.parameters, set(kept.names), kept.expected) for kept in found.kept}
    assert kinds == {
        "layers that are not called": (12, {"skipped"}, False),
        "transposed convolutions": (3 * 5 * 4 + 5, {"up"}, False),
        "layers with a forward or a weight of their own making": (9 + 3 + 6 + 2 + 2, {"doubled", "scaled"}, False),
        "matrices stacked in one parameter, such as experts": (60, {"experts"}, False),
        "matrices outside of layers": (24, {"table"}, True),
        "embeddings": (21, {"words.weight"}, True),
        "norms and other vectors": (10, {"norm.weight", "norm.bias"}, True),
    }
    assert found.quantized == SIZE
    assert found.parameters == SIZE + sum(kept.parameters for kept in found.kept)
    assert [kept.parameters for kept in found.kept] == sorted((k.parameters for k in found.kept), reverse=True)


def test_layers_without_a_reason_were_left_out_by_choice() -> None:
    kinds = {kept.kind: kept.names for kept in coverage(Everything(), QUANTIZED[1:]).kept if kept.expected}
    assert kinds["Linear and Conv layers left out by choice"] == ["proj", "skipped"]


def test_what_is_counted_is_the_same_before_while_and_after_a_layer_is_packed() -> None:
    model = Everything().requires_grad_(False)
    before = coverage(model, QUANTIZED)
    for name in QUANTIZED:
        layer = make_quantized(model.get_submodule(name), Granularity("channel"))
        scale = layer.weight.flatten(1).abs().amax(1, keepdim=True) / 6
        layer.variants["quantized"] = LayerQuantization([Quantizer(parse_format("e2m1"), scale)])
        layer.variants["quantized"].set_bias(layer.bias)
    assert coverage(model, QUANTIZED) == before
    for name in QUANTIZED:
        layer = model.get_submodule(name)
        pack_layer(layer, layer.variants["quantized"])
    assert coverage(model, ()) == before


def test_it_reads_back_from_plain_types_and_names_three_of_a_kind_in_words() -> None:
    model = nn.Sequential(nn.Linear(10, 10), *(nn.Linear(i, 1) for i in (5, 6, 7, 8)))
    found = coverage(model, {"0"}, dict.fromkeys("1234", "lazy layers"))
    assert Coverage.from_dict(json.loads(json.dumps(asdict(found)))) == found
    assert found.lines() == [
        "quantized: 79.37% of the denoiser's parameters",
        "in full precision: 20.63% lazy layers (4, 3, 2 and 1 more)",
    ]
