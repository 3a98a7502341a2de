"""Closed-form rounding of whole units: what reads what, what is measured, and what becomes of it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from models import tiny_pipeline
from torch import Tensor, nn

from fpq_lightning import ActivationRecipe, CalibrationDataModule, Recipe, RoundingRecipe, SamplerConfig, WeightRecipe
from fpq_lightning import quantize as calibrate
from fpq_lightning.calibration.replay import NetworkReplay
from fpq_lightning.formats.numbers import parse_format
from fpq_lightning.nn.calibrated import LayerQuantization, QuantizedLayer, quantized_layers, running
from fpq_lightning.nn.convert import make_quantized
from fpq_lightning.quantization.quantizer import Granularity, Quantizer
from fpq_lightning.reconstruction.closed_form import _Readers, _some, _stages, solve_unit

SAMPLES, TOKENS, WIDTH = 24, 10, 12
HELD_OUT = 8
CHANNEL = Granularity("channel")
RECIPE = Recipe(WeightRecipe("fp4"), ActivationRecipe("fp8"))


class Attention(nn.Module):
    """Queries, keys and values of one tensor, a shortcut, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("query", "key", "value", "out", "shortcut", "shared", "unused"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        y = self.out((q @ k.mT / WIDTH**0.5).softmax(-1) @ v) + self.shortcut(x)
        return cast(Tensor, self.shared(self.shared(y).tanh()))


def replay_of(module: nn.Module, x: Tensor, budget: int = 2**30) -> Any:
    """As much of a replay as is needed, at a unit with these inputs."""
    for layer in [m for m in module.modules() if isinstance(m, nn.Linear)]:
        quantized = make_quantized(layer, CHANNEL)
        quantized.granularity = CHANNEL
        scale = quantized.weight.detach().float().abs().amax(1, keepdim=True) / 6
        quantized.variants["nearest"] = LayerQuantization([Quantizer(parse_format("e2m1"), scale)])
    return SimpleNamespace(
        unit=SimpleNamespace(module=module),
        inputs=lambda rows: x[rows],
        reference_inputs=lambda rows: x[rows],
        call=module,
        weights=lambda rows: torch.ones(len(rows)),
        n=len(x),
        chunks=lambda rows: iter(rows.split(10)),
        store=SimpleNamespace(device=torch.device("cpu"), budgets={"device": budget}),
    )


@pytest.fixture
def attention() -> tuple[Any, dict[str, QuantizedLayer], Tensor]:
    torch.manual_seed(0)
    module = Attention().eval().requires_grad_(False)
    x = torch.randn(SAMPLES, TOKENS, WIDTH) @ torch.randn(WIDTH, WIDTH)
    replay = replay_of(module, x)
    return replay, quantized_layers(module), x


def test_layers_are_taken_in_stages_and_those_of_one_input_together(attention: Any) -> None:
    replay, layers, _ = attention
    stages = [[(set(r.layers), r.calls) for r in stage] for stage in _stages(cast(NetworkReplay, replay), layers)]
    assert stages == [
        [({"query", "key", "value", "shortcut"}, 1)],
        [({"out"}, 1)],
        [({"shared"}, 2)],
        [({"unused"}, 1)],
    ]


def test_the_unit_is_much_closer_than_with_nearest_rounding_and_the_unused_layer_is_named(attention: Any) -> None:
    replay, layers, x = attention
    module = replay.unit.module
    with pytest.warns(UserWarning, match="unused: no finite statistics of their inputs, so rounded to nearest"):
        solve_unit(replay, layers, torch.arange(HELD_OUT, SAMPLES), torch.arange(HELD_OUT), RECIPE)
    assert layers["unused"].variants["closed_form"].codes is None
    outputs = {}
    for mode in ("full_precision", "nearest", "closed_form"):
        with running(module, cast(Any, mode)):
            outputs[mode] = module(x)
    errors = {mode: (found - outputs["full_precision"]).square().mean() for mode, found in outputs.items()}
    assert errors["closed_form"] < 0.4 * errors["nearest"]


@pytest.mark.parametrize("budget", [2**30, 20_000])
def test_one_pass_of_the_full_precision_unit_serves_all_stages_if_there_is_room(attention: Any, budget: int) -> None:
    replay, layers, x = attention
    passes = []
    replay.reference_inputs = lambda rows: passes.append(len(rows)) or x[rows]
    replay.store.budgets["device"] = budget
    with pytest.warns(UserWarning, match="unused"):
        solve_unit(replay, layers, torch.arange(HELD_OUT, SAMPLES), torch.arange(HELD_OUT), RECIPE)
    chunks = 3  # of 10 samples at most: two of what is learned from, one of what is held out
    assert len(passes) == (chunks if budget == 2**30 else chunks * len(_stages(cast(NetworkReplay, replay), layers)))
    codes = {name: layer.variants["closed_form"].codes for name, layer in layers.items()}
    others = dict(_solved_with(x, 2**30))
    assert {name for name, found in codes.items() if found is not None} == {*others} - {"unused"}
    assert all(torch.equal(codes[name][0], found[0]) for name, found in others.items() if found is not None)


def _solved_with(x: Tensor, budget: int) -> Any:
    torch.manual_seed(0)
    module = Attention().eval().requires_grad_(False)
    replay = replay_of(module, x, budget)
    layers = quantized_layers(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solve_unit(replay, layers, torch.arange(HELD_OUT, SAMPLES), torch.arange(HELD_OUT), RECIPE)
    return ((name, layer.variants["closed_form"].codes) for name, layer in layers.items())


def test_biases_take_the_mean_error_of_a_layer(attention: Any) -> None:
    replay, layers, x = attention
    shortcut = layers["shortcut"]
    with pytest.warns(UserWarning, match="unused"):
        solve_unit(replay, layers, torch.arange(HELD_OUT, SAMPLES), torch.arange(HELD_OUT), RECIPE)
    means = {}
    for mode in ("full_precision", "nearest", "closed_form"):
        with running(shortcut, cast(Any, mode)):
            means[mode] = shortcut(x[HELD_OUT:]).mean((0, 1))
    shift, before = (means[mode] - means["full_precision"] for mode in ("closed_form", "nearest"))
    assert shift.abs().max() < 1e-5 < before.abs().max()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_leave_nearest_rounding_and_a_line(attention: Any, value: float) -> None:
    replay, layers, x = attention
    x[HELD_OUT + 3, 2, 1] = value
    with pytest.warns(UserWarning, match="query, key, value, shortcut: no finite statistics"):
        solve_unit(replay, layers, torch.arange(HELD_OUT, SAMPLES), torch.arange(HELD_OUT), RECIPE)
    assert all(layer.variants["closed_form"].codes is None for layer in layers.values())


def test_moments_beyond_the_budget_leave_nearest_rounding_and_a_line(attention: Any) -> None:
    replay, layers, _ = attention
    replay.store.budgets["device"] = 1000
    with pytest.warns(UserWarning, match=r"are more than data\.store_budget, so rounded to nearest"):
        solve_unit(replay, layers, torch.arange(HELD_OUT, SAMPLES), torch.arange(HELD_OUT), RECIPE)
    assert all(layer.variants["closed_form"].codes is None for layer in layers.values())


class Skip(nn.Module):
    """A layer that reads a concatenation, or one layer for each piece of it."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        weight, bias = torch.randn(5, WIDTH), torch.randn(5)
        runs = {"first": slice(8), "second": slice(8, None)} if apart else {"whole": slice(None)}
        for name, run in runs.items():
            layer = nn.Linear(len(weight[0, run]), 5).requires_grad_(False)
            layer.weight.copy_(weight[:, run])
            layer.bias.copy_(bias)
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return cast(
            Tensor, self.first(x[..., :8]) + self.second(x[..., 8:]) if hasattr(self, "first") else self.whole(x)
        )


@pytest.mark.parametrize("budget", [2 * 8 * 8 * 10, 2 * 8 * (8 * 10 + 4 * 6)], ids=["one at a time", "both at once"])
def test_pieces_of_a_concatenation_are_solved_apart_where_the_whole_takes_too_much_memory(budget: int) -> None:
    found, shifts = [], []
    for apart in (True, False):
        torch.manual_seed(0)
        x = torch.randn(SAMPLES, TOKENS, WIDTH) @ torch.randn(WIDTH, WIDTH) + 1
        module = Skip(apart).eval()
        bias = next(iter(module.children())).bias.clone()
        replay = replay_of(module, x, budget)
        layers = quantized_layers(module)
        if not apart:
            layers["whole"].splits = (8, 4)
            parts = layers["whole"].weight_parts()
            grids = [Quantizer(parse_format("e2m1"), part.abs().amax(1, keepdim=True) / 6) for part in parts]
            layers["whole"].variants["nearest"] = LayerQuantization(grids)
        solve_unit(replay, layers, torch.arange(HELD_OUT, SAMPLES), torch.arange(HELD_OUT), RECIPE)
        solved = [layer.variants["closed_form"] for layer in layers.values()]
        found.append([codes for q in solved for codes in q.codes])
        scales = [q.scale.data for layer in solved for q in layer.weights]
        shifts.append((sum(layer.bias - bias for layer in solved), scales))
    assert all(map(torch.equal, *found))
    assert torch.allclose(shifts[0][0], shifts[1][0], atol=1e-5)
    assert all(map(torch.equal, shifts[0][1], shifts[1][1]))


def test_one_sample_and_dead_inputs_are_enough_for_a_sound_answer(attention: Any) -> None:
    replay, layers, x = attention
    x[:, :, 4:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solve_unit(replay, layers, torch.arange(1), torch.arange(1, 2), RECIPE)
    with running(replay.unit.module, "closed_form"):
        assert replay.unit.module(x).isfinite().all()


@pytest.mark.parametrize("learned", [False, True])
def test_a_run_keeps_the_closed_form_or_what_was_learned_from_it(tmp_path: Path, learned: bool) -> None:
    rounding = RoundingRecipe(learned=learned, iterations=10, batch_size=4)
    recipe = Recipe(rounding=rounding, include=["conv_in", "mid_block.*", "up_blocks.0.*"])
    data = CalibrationDataModule(n_samples=32, n_search=8, micro_batch=8)
    calibrate(tiny_pipeline(), recipe, tmp_path / "run", data, SamplerConfig(steps=4, batch_size=8), accelerator="cpu")
    blocks = [b for b in json.loads((tmp_path / "run" / "report.json").read_text())["blocks"] if b["error_nearest"]]
    assert len(blocks) > 3
    assert sum(b["error_closed_form"] / b["error_nearest"] for b in blocks) < 0.95 * len(blocks)
    assert all(b["error_quantized"] <= min(b["error_nearest"], b["error_closed_form"]) for b in blocks)
    kept = {b["kept"] for b in blocks}
    assert kept <= {"closed_form", "nearest", *(["learned"] if learned else [])}
    assert kept & ({"learned"} if learned else {"closed_form"})


class Experts(nn.Module):
    """The sign of a token's first value decides which layer it goes to; most samples need the first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        for layer, chosen in ((self.first, x[..., 0] > 0), (self.second, x[..., 0] <= 0)):
            if chosen.any():
                y[chosen] = layer(x[chosen])
        return cast(Tensor, self.last(y))


def test_experts_that_few_samples_need_are_solved_from_those() -> None:
    torch.manual_seed(0)
    module = Experts().eval().requires_grad_(False)
    x = torch.randn(SAMPLES, TOKENS, WIDTH) @ torch.randn(WIDTH, WIDTH)
    x[:12, :, 0] = x[:12, :, 0].abs() + 0.1  # not the first ones that show the order
    replay = replay_of(module, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve_unit(replay, quantized_layers(module), torch.arange(HELD_OUT, SAMPLES), torch.arange(HELD_OUT), RECIPE)
    outputs = {}
    for mode in ("full_precision", "nearest", "closed_form"):
        with running(module, cast(Any, mode)):
            outputs[mode] = module(x)
    errors = {mode: (found - outputs["full_precision"]).square().mean() for mode, found in outputs.items()}
    assert all(layer.variants["closed_form"].codes is not None for layer in quantized_layers(module).values())
    assert errors["closed_form"] < 0.6 * errors["nearest"]


class TwoStreams(nn.Module):
    """One layer for two kinds of tokens, called for each or for both at once."""

    def __init__(self, at_once: bool) -> None:
        super().__init__()
        self.shared, self.at_once = nn.Linear(WIDTH, WIDTH), at_once

    def forward(self, x: Tensor) -> Tensor:
        if self.at_once:
            return cast(Tensor, self.shared(x))
        return torch.cat([self.shared(x[:, :7]), self.shared(x[:, 7:])], 1)


def test_a_layer_called_for_two_kinds_of_tokens_is_solved_as_if_it_was_called_for_both_at_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, TOKENS, WIDTH) @ torch.randn(WIDTH, WIDTH)
    x[:, 7:] *= 5
    found = []
    for at_once in (False, True):
        module = TwoStreams(at_once).requires_grad_(False)
        torch.manual_seed(1)
        module.shared.weight.copy_(torch.randn(WIDTH, WIDTH))
        learned_from, held_out = torch.arange(SAMPLES).split([SAMPLES - HELD_OUT, HELD_OUT])
        solve_unit(replay_of(module, x), quantized_layers(module), learned_from, held_out, RECIPE)
        found.append(cast(Any, module.shared).variants["closed_form"])
    separate, together = found
    assert torch.equal(separate.codes[0], together.codes[0])


@pytest.mark.parametrize("folded", [1, 3])
def test_places_of_a_sample_do_not_depend_on_who_else_is_in_the_batch(folded: int) -> None:
    readers = _Readers({"layer": make_quantized(nn.Linear(2, 3), Granularity())}, 1)
    x = torch.randn(8, folded, 500, 2)
    every = torch.arange(8)
    whole = _some(readers, x.flatten(0, 1), every)
    assert whole.shape[:2] == (8 * folded, 64)
    for size in (1, 3, 8):
        parts = [_some(readers, x[chunk].flatten(0, 1), chunk) for chunk in every.split(size)]
        assert torch.equal(torch.cat(parts), whole)
