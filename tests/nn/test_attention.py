"""Attention with quantized products: its numbers, where it is found, and what it leaves alone."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeNetwork
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, AttnProcessor
from models import (
    checkpoint_layers,
    fit_arguments,
    quantized_files,
    run_fpq,
    run_scenarios,
    save_tiny,
    scenario,
    tiny_pipeline,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from fpq_lightning import (
    ActivationRecipe,
    AttentionRecipe,
    CalibrationDataModule,
    Recipe,
    RoundingRecipe,
    SamplerConfig,
    WeightRecipe,
    load_quantized,
    parse_format,
    quantize,
)
from fpq_lightning.formats.numbers import Format
from fpq_lightning.graph.attention import quantize_attention
from fpq_lightning.graph.trace import trace_units
from fpq_lightning.graph.units import Unit, discover_units
from fpq_lightning.nn import attention as attention_module
from fpq_lightning.nn.attention import OperandSample, attention, observing, quantized_attention
from fpq_lightning.nn.calibrated import LayerQuantization, running
from fpq_lightning.nn.convert import make_attention_quantized
from fpq_lightning.nn.hashing import hash_quantization
from fpq_lightning.quantization.quantizer import Quantizer
from fpq_lightning.reconstruction.initialise import search_attention
from fpq_lightning.storage.pipeline import read_description

B, H, L, S, E = 2, 4, 5, 8, 6


def _keys_seen() -> Tensor:
    """A mask under which query 2 of the first sample sees no key."""
    mask = torch.rand(B, 1, L, S, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0, 0, 2] = False
    return mask


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.7},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": _keys_seen()},
    "added mask": {"attn_mask": torch.randn(H, L, S, generator=torch.Generator().manual_seed(2))},
    "mask of keys": {"attn_mask": torch.tensor([0.0] * 5 + [-math.inf] * 3)[None, None, None]},
    "grouped queries": {"enable_gqa": True},
    "grouped queries, masked": {"enable_gqa": True, "attn_mask": _keys_seen(), "scale": 2.0},
}


def _operands(name: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    heads = 2 if CALLS[name].get("enable_gqa") else H
    shapes = ((B, H, L, E), (B, heads, S, E), (B, heads, S, 3))
    q, k, v = (torch.randn(shape, generator=draw) for shape in shapes)
    return q, k, v


def _same(x: Tensor) -> Tensor:
    return x


def _nearest(x: Tensor, fmt: Format, scale: float) -> Tensor:
    """Every value replaced by the nearest of all that there are, by trying them all, in float64."""
    values = fmt.grid.double() * scale
    return values[(x.double()[..., None] - values).abs().argmin(-1)]


def _by_hand(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, is_causal: bool = False, scale: Any = None,
    enable_gqa: bool = False, formats: tuple[str, ...] = (), scales: tuple[float, ...] = (),
) -> Tensor:  # fmt: skip
    """Attention by its definition, a query at a time, in float64."""

    def rounded(x: Tensor, i: int) -> Tensor:
        return _nearest(x, parse_format(formats[i]), scales[i]) if formats else x.double()

    q, k, v = rounded(q, 0), rounded(k, 1), rounded(v, 2)
    out = torch.zeros(B, H, L, v.shape[-1], dtype=torch.float64)
    mask = None if attn_mask is None else attn_mask.expand(B, H, L, S)
    for b in range(B):
        for h in range(H):
            shared = h * k.shape[1] // H
            for i in range(L):
                scores = (k[b, shared] * q[b, h, i]).sum(-1) * (E**-0.5 if scale is None else scale)
                keep = torch.ones(S, dtype=torch.bool)
                if is_causal:
                    keep = torch.arange(S) <= i
                elif mask is not None and mask.dtype == torch.bool:
                    keep = mask[b, h, i]
                elif mask is not None:
                    scores = scores + mask[b, h, i].double()
                weights = torch.where(keep, scores.exp(), 0.0)
                if keep.any():
                    weights = weights / weights.sum()
                out[b, h, i] = (rounded(weights, 3)[:, None] * v[b, shared]).sum(0)
    return out


# --- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("chunk", [2**26, 3 * B * H * S], ids=["at once", "three queries at a time"])
def test_with_operands_left_alone_it_is_the_fused_function_and_so_is_its_gradient(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "_CHUNK", chunk)
    operands = [x.requires_grad_() for x in _operands(name)]
    direction = torch.randn(B, H, L, 3, generator=torch.Generator().manual_seed(5))
    found = attention(*operands, **CALLS[name], operands=[_same] * 4)
    expected = F.scaled_dot_product_attention(*operands, **CALLS[name])
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(found.double(), _by_hand(*(x.detach() for x in operands), **CALLS[name]), atol=1e-6)
    pairs = [torch.autograd.grad((out * direction).sum(), operands) for out in (found, expected)]
    for mine, theirs in zip(*pairs, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("formats", [("e2m1", "e3m0", "e1m2", "ue2m2"), ("e4m3", "e2m5", "int8", "ue4m4")])
def test_every_operand_goes_to_the_nearest_value_of_its_format(name: str, formats: tuple[str, ...]) -> None:
    q, k, v = _operands(name)
    scales = tuple(top / parse_format(f).max for top, f in zip((2.5, 3.0, 2.0, 0.9), formats, strict=True))
    quantizers = [Quantizer(parse_format(f), torch.tensor(s)) for f, s in zip(formats, scales, strict=True)]
    found = attention(q, k, v, **CALLS[name], operands=quantizers)
    expected = _by_hand(q, k, v, **CALLS[name], formats=formats, scales=scales)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert not torch.allclose(found, F.scaled_dot_product_attention(q, k, v, **CALLS[name]), atol=1e-3)


def test_it_gives_the_dtype_of_its_query_and_computes_in_float32_even_under_autocast() -> None:
    operands = [x.bfloat16() for x in _operands("plain")]
    expected = _by_hand(*operands)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention(*operands, operands=[_same] * 4)
        wide = attention(*(x.float() for x in operands), operands=[_same] * 4)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wide.bfloat16())
    assert torch.allclose(wide.double(), expected, atol=1e-6)


def test_nothing_in_it_waits_for_a_value_so_that_a_cuda_graph_can_hold_it() -> None:
    formats = [parse_format(f) for f in ("e4m3", "e3m0", "int8", "ue4m4")]
    for name in CALLS:
        with FakeTensorMode(allow_non_fake_inputs=True):  # whose tensors have no values to give
            quantizers = [Quantizer(f, torch.tensor(0.1), torch.tensor(0.0) if f.min == 0 else None) for f in formats]
            for quantizer in quantizers:
                quantizer.learn_scale()
            operands = [x.requires_grad_() for x in _operands(name)]
            attention(*operands, **CALLS[name], operands=quantizers).sum().backward()
            assert all(q.log_gain.grad is not None for q in quantizers)


def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout \(0\.1\)"):
        attention(*_operands("plain"), dropout_p=0.1, operands=[_same] * 4)


# --- modules ---------------------------------------------------------------------------------------------------


class _Count(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple, dict]] = []

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append((args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


class TwoCalls(nn.Module):
    """Attends to itself, then to what it is given, under a mask."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.project = nn.Linear(E, 3 * E)
        self.dropout = dropout

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, dim=-1)
        x = F.scaled_dot_product_attention(q, k, v, None, self.dropout, is_causal=True)
        return x + F.scaled_dot_product_attention(query=x, key=other, value=other, scale=0.3)


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(E, E), inner, nn.Linear(E, E)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.leave(self.inner(self.enter(x), other))


class Network(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(module) for module in inner])

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, other)
        return x


def _inputs(n: int = 2) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {"x": torch.randn(n, L, E, generator=draw), "other": torch.randn(n, S, E, generator=draw)}


def _quantized(model: nn.Module, inputs: Mapping[str, Any], exclude: list[str] | None = None) -> tuple[list, list[str]]:
    """Units of a network, and where its attention is left."""
    units, _ = trace_units(model, discover_units(model), inputs)
    return units, quantize_attention(model, units, inputs, ["*"], exclude or [])


def _two_calls() -> tuple[nn.Module, Unit]:
    torch.manual_seed(0)
    model = Network(TwoCalls(), TwoCalls()).eval().requires_grad_(False)
    units, left = _quantized(model, _inputs())
    assert not left
    return model, units[0]


@pytest.mark.parametrize("name", ["unet", "conditional_unet", "dit", "flux"])
def test_attention_of_diffusers_is_found_in_its_block_and_left_bit_equal_in_full_precision(
    name: str, make_network: MakeNetwork
) -> None:
    model, inputs = make_network(name, 2)
    with torch.no_grad(), _Count() as before:
        expected = model(**inputs)[0]
    kinds = (Attention, AttentionModuleMixin)
    modules = {n for n, m in model.named_modules() if isinstance(m, kinds)}
    units, left = _quantized(model, inputs)
    assert not left
    assert set(quantized_attention(model)) == modules == {n for unit in units for n in unit.attention}
    for unit in units:
        assert all(module in set(unit.module.modules()) for module in unit.attention.values())
    assert all(isinstance(m, kinds) for m in quantized_attention(model).values())
    with torch.no_grad(), _Count() as after:
        assert torch.equal(model(**inputs)[0], expected)
    assert len(after.calls) == len(before.calls) == len(modules)


def test_in_a_quantized_mode_no_call_is_fused_and_all_else_is_untouched() -> None:
    model, unit = _two_calls()
    module = unit.attention["blocks.0.inner"]
    x, other = _inputs().values()
    formats = ("e2m1", "e2m3", "e3m2", "ue2m2", "e4m3", "e3m4", "e2m5", "ue4m4")
    quantizers = [Quantizer(parse_format(f), torch.tensor(2 / parse_format(f).max)) for f in formats]
    module.variants["nearest"] = LayerQuantization(inputs=quantizers)
    with _Count() as calls, running(model, "nearest"):
        found = module(x, other)
    assert not calls.calls
    q, k, v = module.project(x).chunk(3, dim=-1)
    own = attention(q, k, v, is_causal=True, operands=quantizers[:4])
    expected = own + attention(own, other, other, scale=0.3, operands=quantizers[4:])
    assert torch.equal(found, expected)
    with _Count() as calls:
        assert not torch.equal(module(x, other), found)
    assert len(calls.calls) == 2


def test_a_call_more_or_less_than_in_calibration_is_one_line_with_the_name_of_the_module() -> None:
    module = make_attention_quantized(TwoCalls(), "tower.7.mix", 1)
    module.variants["quantized"] = LayerQuantization(inputs=[Quantizer(parse_format("e4m3"), torch.tensor(1.0))] * 4)
    with running(module, "quantized"), pytest.raises(ValueError, match=r"tower\.7\.mix: .* 2 times, 1 in") as error:
        module(*_inputs().values())
    assert "\n" not in str(error.value)


def test_an_excluded_module_stays_as_it_is() -> None:
    model = Network(TwoCalls(), TwoCalls())
    units, left = _quantized(model, _inputs(), exclude=["blocks.1.*"])
    assert list(units[0].attention) == ["blocks.0.inner"] == list(quantized_attention(model))
    assert not units[1].attention
    assert type(model.blocks[1].inner) is TwoCalls
    assert left == []


class Explicit(nn.Module):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.softmax(x @ other.mT, -1).to(torch.float64).float() @ other


class WithTorch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(E, 2, batch_first=True)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.attend(x, other, other)[0]


class Around(nn.Module):
    """Calls attention itself and holds a module that does."""

    def __init__(self) -> None:
        super().__init__()
        self.within = TwoCalls()

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.within(x, other), other, other)


class Gate(nn.Module):
    """A softmax that is no attention."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x.softmax(-1) * x


class Twice(nn.Module):
    """Runs the same module two times."""

    def __init__(self, within: nn.Module | None = None) -> None:
        super().__init__()
        self.within = within or TwoCalls()

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.within(self.within(x, other), other)


class Sometimes(TwoCalls):
    """Attends in every second forward."""

    turns = 0

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        self.turns += 1
        return super().forward(x, other) if self.turns % 2 else x


def test_a_module_that_runs_twice_has_one_set_of_quantizers() -> None:
    model = Network(Twice(), TwoCalls()).eval()
    units, left = _quantized(model, _inputs())
    assert not left
    with observing(units[0].attention) as samples, torch.no_grad():
        model(**_inputs())
    search_attention(units[0], samples, Recipe(attention=AttentionRecipe("fp8")))
    module = model.blocks[0].inner.within
    assert len(module.variants["nearest"].inputs) == 2 * 4
    with running(model, "nearest"), _Count() as count:
        model(**_inputs())
    assert len(count.calls) == 2  # of the other block, which has no such variant


@pytest.mark.parametrize(
    ("inner", "left"),
    [
        (Explicit, ["blocks.1.inner"]),
        (WithTorch, ["blocks.1.inner.attend"]),
        (Around, ["blocks.1.inner"]),
        (lambda: Twice(Sometimes()), ["blocks.1.inner.within"]),
        (lambda: TwoCalls(dropout=0.1), ["blocks.1.inner"]),
        (Gate, []),
    ],
    ids=["explicit softmax", "multi-head attention of torch", "around another", "sometimes", "dropout", "no attention"],
)
def test_attention_that_cannot_be_intercepted_is_left_and_named(inner: Callable[[], nn.Module], left: list) -> None:
    model = Network(TwoCalls(), inner()).eval()
    _, found = _quantized(model, _inputs())
    assert found == left
    assert "blocks.0.inner" in quantized_attention(model)
    assert not set(left) & set(quantized_attention(model))


def test_processors_with_an_explicit_softmax_are_left_and_named(make_network: MakeNetwork) -> None:
    model, inputs = make_network("conditional_unet", 2)
    model.set_attn_processor(AttnProcessor())
    _, left = _quantized(model, inputs)
    assert set(left) == {n for n, m in model.named_modules() if isinstance(m, Attention)}
    assert not quantized_attention(model)


def test_attention_of_a_block_without_chosen_layers_or_outside_the_blocks_is_left_and_named() -> None:
    class Outside(Network):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return super().forward(F.scaled_dot_product_attention(x, other, other), other)

    model = Outside(TwoCalls(), TwoCalls()).eval()
    units, _ = trace_units(model, discover_units(model, ["blocks.1.*"]), _inputs())
    left = quantize_attention(model, units, _inputs(), ["*"], [])
    assert left == ["Outside", "blocks.0.inner"]
    # What calls attention itself does not hide that of the blocks: it is asked of each call who made it.
    assert list(quantized_attention(model)) == ["blocks.1.inner"]


def test_a_network_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="computes no attention"):
        _quantized(Network(Gate(), Gate()), _inputs())


# --- search ----------------------------------------------------------------------------------------------------


def test_the_search_finds_the_format_and_clip_of_least_error_of_every_operand_of_every_call() -> None:
    model, unit = _two_calls()
    module = unit.attention["blocks.0.inner"]
    inputs = [_inputs(4), {name: -0.7 * x for name, x in _inputs(3).items()}]
    with observing(unit.attention) as samples, torch.no_grad():
        for some in inputs:
            model(**some)
    search_attention(unit, samples, Recipe(attention=AttentionRecipe("fp8")))
    found = module.variants["nearest"].inputs
    assert len(found) == 8
    # The operands anew, from what the model's own fused calls are given.
    calls = []
    for some in inputs:
        with _Count() as count:
            model(**some)
        calls += [count.calls[:2]]
    for call in range(2):
        seen: list[list[Tensor]] = [[], [], [], []]
        for batch in calls:
            args, kwargs = batch[call]
            q, k, v = args[:3] if args else (kwargs["query"], kwargs["key"], kwargs["value"])
            scores = q.double() @ k.double().mT * kwargs.get("scale", E**-0.5)
            if kwargs.get("is_causal"):
                scores.masked_fill_(~torch.ones(L, L).tril().bool(), -math.inf)
            for parts, operand in zip(seen, (q, k, v, scores.softmax(-1)), strict=True):
                parts.append(operand.flatten().double())
        for i, parts in enumerate(seen):
            values, quantizer = torch.cat(parts), found[4 * call + i]
            names = ("ue5m3", "ue4m4", "ue3m5", "ue2m6") if i == 3 else ("e5m2", "e4m3", "e3m4", "e2m5")
            errors = {
                (name, clip): (_nearest(values, fmt, clip * values.abs().max().item() / fmt.max) - values)
                .square()
                .sum()
                .item()
                for name in names
                for clip in torch.linspace(0.1, 1.2, 111).tolist()
                for fmt in [parse_format(name)]
            }
            mine = (_nearest(values, quantizer.format, quantizer.scale.item()) - values).square().sum().item()
            assert quantizer.format.name in names
            assert quantizer.scale.shape == ()
            # The extremes count once more in the search, which may prefer a neighbour by a hair.
            assert mine <= 1.05 * min(errors.values())


def test_a_sample_of_an_operand_is_bounded_sees_every_key_and_holds_the_extremes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_module, "_SAMPLE", 1000)
    sample = OperandSample()
    keys = torch.arange(64.0).expand(2, 32, 64)
    for number in range(20):
        x = keys + 100 * number
        assert sample(x) is x
    values = sample.values[0]
    assert 300 < len(values) < 1000 + 2 * 20
    assert (values.min(), values.max()) == (0, 1963)
    inner = values[:-40]
    assert len(set((inner % 100).tolist())) == 64  # no key is left out
    counts = torch.bincount((inner // 100).long(), minlength=20)
    assert counts.max() - counts.min() <= 1  # and calls have equal parts


def test_the_sample_of_an_operand_holds_the_extremes_of_every_call_wherever_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_module, "_SAMPLE", 100)
    draw = torch.Generator().manual_seed(0)
    sample, extremes = OperandSample(), []
    for number in range(12):
        x = torch.randn(4, 50, generator=draw)
        x[number % 4, 7 + number], x[1 + number % 3, 30 - number] = 10.0 + number, -10.0 - number
        extremes += [10.0 + number, -10.0 - number]
        sample(x)
    assert set(extremes) <= set(sample.values[0].tolist())


def test_an_operand_that_is_not_finite_is_refused_by_name() -> None:
    model, unit = _two_calls()
    bad = _inputs()
    bad["other"][0, 0, 0] = math.inf
    with observing(unit.attention) as samples, torch.no_grad():
        model(**bad)
    with pytest.raises(ValueError, match=r"blocks\.0\.inner: its key holds NaN or Inf") as error:
        search_attention(unit, samples, Recipe(attention=AttentionRecipe("fp8")))
    assert "\n" not in str(error.value)


def test_the_hash_of_a_quantization_knows_the_scales_of_attention() -> None:
    model, unit = _two_calls()
    quantizer = Quantizer(parse_format("e4m3"), torch.tensor(1.0))
    unit.attention["blocks.0.inner"].variants["nearest"] = LayerQuantization(inputs=[quantizer] * 8)
    before = hash_quantization(model, "nearest")
    quantizer.scale.mul_(1.5)
    assert hash_quantization(model, "nearest") != before


# --- runs ------------------------------------------------------------------------------------------------------

ATTENTION = "mid_block.attentions.0"  # of the tiny network, a unit of its own, the sixth


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run, one that was killed while it learned the attention and once after, and one without attention."""
    root = tmp_path_factory.mktemp("attention")
    model = save_tiny(root / "model")

    def fit(name: str, *more: str) -> list[str]:
        return [*fit_arguments(model, root / name, 20), "--checkpoint_steps=10", *more]

    on, last = "--recipe.attention.formats=fp8", "--ckpt_path=last"
    commands = [
        scenario(root / "1", fit("whole", on)),
        scenario(root / "2", fit("killed", on), ("steps", "gradients", 5 * 20 + 16)),
        scenario(root / "3", fit("killed", on, last), ("steps", "gradients", 3 * 20 + 4)),
        scenario(root / "4", fit("killed", on, last)),
        scenario(root / "5", fit("off")),
    ]
    outcomes = run_scenarios(commands)
    assert [o.code for o in outcomes] == [0, -signal.SIGKILL, -signal.SIGKILL, 0, 0], [o.err for o in outcomes]
    return {name: root / name for name in ("whole", "killed", "off")}


def _blocks(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "report.json").read_text())["blocks"]


def test_a_run_killed_in_its_attention_resumes_to_the_same_bits(runs: dict[str, Path]) -> None:
    expected, found = (quantized_files(runs[name]) for name in ("whole", "killed"))
    assert found == expected
    assert expected["unet/config.json"] != quantized_files(runs["off"])["unet/config.json"]


def test_the_report_lists_the_formats_of_attention_and_learning_moves_their_scales(runs: dict[str, Path]) -> None:
    (block,) = [b for b in _blocks(runs["whole"]) if b["name"] == ATTENTION]
    assert len(block["activation_formats"][ATTENTION]) == 4
    assert ATTENTION not in block["weight_formats"]
    assert block["kept"] == "learned"
    state = checkpoint_layers(runs["whole"])[ATTENTION]
    pairs = zip(state["nearest"]["inputs"], state["quantized"]["inputs"], strict=True)
    assert all(before["scale"] != after["scale"] for before, after in pairs)
    listed = read_description(runs["whole"] / "quantized")["attention"]
    assert [q["format"] for q in listed[ATTENTION]] == [q["format"] for q in state["quantized"]["inputs"]]
    stored = load_file(runs["whole"] / "quantized" / "unet" / "diffusion_pytorch_model.safetensors")
    for k, q in enumerate(state["quantized"]["inputs"]):
        assert stored[f"{ATTENTION}.operands.{k}.scale"] == q["scale"]


def test_without_formats_nothing_of_attention_is_quantized_and_units_before_it_do_not_change(
    runs: dict[str, Path],
) -> None:
    pipeline = load_quantized(runs["off"] / "quantized")
    assert not quantized_attention(pipeline.unet)
    with _Count() as count:
        pipeline.unet(torch.randn(1, 3, 8, 8), torch.tensor(5))
    assert len(count.calls) == 1
    assert "attention" not in read_description(runs["off"] / "quantized")
    same = [(a, b) for a, b in zip(_blocks(runs["whole"]), _blocks(runs["off"]), strict=True)][:4]
    for a, b in same:
        assert a.pop("seconds") != b.pop("seconds")
        assert a == b


@pytest.mark.parametrize(
    "options",
    [
        {"attention": AttentionRecipe("int8")},
        {"attention": AttentionRecipe("fp8"), "hardware_types": True},
        {"attention": AttentionRecipe("fp8"), "weights": WeightRecipe(None), "activations": ActivationRecipe(None)},
    ],
    ids=["integers", "hardware types", "attention alone"],
)
def test_every_kind_of_attention_recipe_runs_end_to_end(options: dict, tmp_path: Path) -> None:
    recipe = Recipe(rounding=RoundingRecipe(start="nearest", learned=True, iterations=4, batch_size=4), **options)
    data = CalibrationDataModule(n_samples=16, n_search=8, micro_batch=8)
    pipeline = quantize(tiny_pipeline(), recipe, tmp_path / "run", data, SamplerConfig(steps=4), accelerator="cpu")
    (block,) = [b for b in _blocks(tmp_path / "run") if b["name"] == ATTENTION]
    *operands, softmax = block["activation_formats"][ATTENTION]
    assert set(operands) <= {f.name for f in recipe.attention_formats()}
    assert softmax in {f.name for f in recipe.softmax_formats()}
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 500])
    found = pipeline.unet(x, t).sample
    assert torch.equal(load_quantized(tmp_path / "run" / "quantized").unet(x, t).sample, found)
    expected = tiny_pipeline().unet(x, t).sample
    assert 0 < (found - expected).square().mean() / expected.square().mean() < 0.3


def test_a_network_without_attention_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def remove(unet: nn.Module) -> None:
        unet.register_to_config(add_attention=False)
        unet.mid_block.attentions = nn.ModuleList([None])

    model = save_tiny(tmp_path / "model", damage=remove)
    outcome = run_fpq(capsys, [*fit_arguments(model, tmp_path / "run"), "--recipe.attention.formats=fp8"])
    assert outcome.code != 0
    assert len(outcome.errors) == 1
    assert "the denoiser computes no attention" in outcome.errors[0]


# --- recipes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "operands", "softmax"),
    [
        ({}, set(), set()),
        ({"attention": AttentionRecipe("fp8")}, {"e5m2", "e4m3", "e3m4", "e2m5"}, {"ue5m3", "ue4m4", "ue3m5", "ue2m6"}),
        ({"attention": AttentionRecipe("int8")}, {"int8"}, {"uint8"}),
        ({"attention": AttentionRecipe("int4")}, {"int4"}, {"uint4"}),
        ({"attention": AttentionRecipe(["e4m3", "e3m4"])}, {"e4m3", "e3m4"}, {"ue5m3", "ue4m4", "ue3m5", "ue2m6"}),
        ({"attention": AttentionRecipe("fp8"), "hardware_types": True}, {"float8_e4m3fn"}, {"float8_e4m3fn"}),
    ],
)
def test_the_softmax_takes_the_unsigned_formats_of_the_width(options: dict, operands: set, softmax: set) -> None:
    recipe = Recipe(**options)
    assert {f.name for f in recipe.attention_formats()} == operands
    assert {f.name for f in recipe.softmax_formats()} == softmax


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": AttentionRecipe("fp9")}, "unknown format 'fp9'"),
        ({"attention": AttentionRecipe("ufp8")}, r"recipe\.attention\.formats must be signed"),
        ({"attention": AttentionRecipe(["e4m3", "uint8"])}, "must be signed, got uint8"),
        ({"attention": AttentionRecipe("fp4")}, r"no unsigned formats of 4 bits, which recipe\.attention\.formats"),
        ({"attention": AttentionRecipe("fp8"), "units": "layer"}, r"recipe\.units"),
        ({"weights": WeightRecipe(None), "activations": ActivationRecipe(None)}, "neither"),
    ],
)
def test_a_recipe_of_attention_that_makes_no_sense_is_one_line(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Recipe(**options)
    assert "\n" not in str(error.value)
