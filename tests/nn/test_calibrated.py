"""Quantized layers against the plain layers and quantization by hand."""

from __future__ import annotations

import copy
import pickle
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fpq_lightning.formats.numbers import Format, parse_format
from fpq_lightning.nn.calibrated import (
    QUANTIZED_CLASSES,
    LayerQuantization,
    QuantizedLayer,
    is_quantizable,
    quantized_layers,
    running,
)
from fpq_lightning.nn.convert import make_plain, make_quantized, pack_layer
from fpq_lightning.quantization.quantizer import Granularity, Quantizer

E2M1, E4M3, INT4, UE4M4 = (parse_format(n) for n in ("e2m1", "e4m3", "int4", "ue4m4"))

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "linear_tokens": (lambda: nn.Linear(6, 4), (2, 5, 6)),
    "linear_without_bias": (lambda: nn.Linear(6, 4, bias=False), (5, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1), (2, 6, 8, 8)),
    "conv2d_1x1": (lambda: nn.Conv2d(6, 4, 1, bias=False), (2, 6, 4, 4)),
    "conv2d_dilated": (lambda: nn.Conv2d(6, 4, 3, dilation=2), (2, 6, 8, 8)),
    "conv2d_circular": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (2, 6, 8, 8)),
    "conv2d_grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 8, 8)),
    "conv2d_depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(6, 4, (1, 3, 3), padding=(0, 1, 1)), (2, 6, 2, 4, 4)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
unsplit = [k for k in LAYERS if k not in ("conv2d_grouped", "conv2d_depthwise")]


def make_layer(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    return build().requires_grad_(False), torch.randn(shape)


def operate(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A plain layer of the same shape with another weight: not the code under test."""
    plain = copy.deepcopy(layer)
    plain.weight.data.copy_(weight)
    if bias is not None:
        plain.bias = nn.Parameter(bias)
    return plain(x)


def quantization_of(layer: QuantizedLayer, x: Tensor, w: Format = E2M1, a: Format = E4M3) -> LayerQuantization:
    """Clips at the largest magnitude of each row of each weight part and of each input part."""
    weights = [Quantizer(w, r.abs().amax(1, keepdim=True) / w.max) for r in layer.weight_rows()]
    parts = x.split(layer.splits, dim=layer.channel_dim) if len(layer.splits) > 1 else (x,)
    inputs = [Quantizer(a, p.abs().max() / a.max) for p in parts]
    return LayerQuantization(weights, inputs)


def make_ready(
    kind: str = "linear", granularity: Granularity | None = None
) -> tuple[nn.Module, QuantizedLayer, Tensor]:
    """A plain layer, the same one quantized with variants nearest and learned, and an input."""
    layer, x = make_layer(kind)
    plain = copy.deepcopy(layer)
    quantized = make_quantized(layer, granularity or Granularity())
    quantized.variants["nearest"] = quantization_of(quantized, x)
    quantized.variants["quantized"] = cast(LayerQuantization, quantized.variants["nearest"]).copy()
    return plain, quantized, x


# --- the swap of classes -------------------------------------------------------------------------------------------


@every_layer
def test_layer_becomes_quantized_in_place_and_stays_what_it_was(kind: str) -> None:
    layer, _ = make_layer(kind)
    parent = nn.Sequential(layer, nn.ReLU())
    original_type, weight = type(layer), layer.weight
    keys = list(parent.state_dict())
    quantized = make_quantized(layer, Granularity())
    assert quantized is layer is parent[0]
    assert isinstance(layer, original_type)
    assert isinstance(layer, QuantizedLayer)
    assert type(layer) is QUANTIZED_CLASSES[original_type]
    assert layer.weight is weight
    assert list(parent.state_dict()) == keys
    assert quantized_layers(parent) == {"0": quantized}
    assert is_quantizable(layer)
    assert quantized.mode == "full_precision"


def test_hooks_and_tied_uses_survive_the_swap() -> None:
    layer = nn.Linear(3, 3)
    network = nn.Sequential(layer, layer)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    make_quantized(layer, Granularity())
    network(torch.zeros(1, 3))
    assert len(calls) == 2


def test_only_layers_that_compute_a_plain_linear_map_are_quantizable() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert all(is_quantizable(m) for m in (nn.Linear(1, 1), nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv3d(1, 1, 1)))
    others = (Scaled(1, 1), nn.ConvTranspose2d(1, 1, 1), nn.Embedding(2, 2), nn.LayerNorm(3), nn.Bilinear(1, 1, 1))
    assert not any(is_quantizable(m) for m in others)


class Named(nn.Linear):
    """A subclass that computes what its base does, and holds more."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.name = "a name"


class NamedConv(nn.Conv2d):
    pass


@pytest.mark.parametrize(("make", "shape"), [(lambda: Named(6, 4), (5, 6)), (lambda: NamedConv(6, 4, 3), (2, 6, 8, 8))])
def test_a_subclass_that_keeps_the_forward_is_quantized_packed_copied_and_made_plain_again(
    make: Any, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer, x = make().requires_grad_(False), torch.randn(shape)
    plain, kind = copy.deepcopy(layer), type(layer)
    assert is_quantizable(layer)
    quantized = make_quantized(layer, Granularity())
    assert isinstance(quantized, kind)
    assert torch.equal(quantized(x), plain(x))
    quantized.variants["quantized"] = quantization_of(quantized, x)
    quantized.set_mode("quantized")
    weight = quantized.quantized_weight(quantized.variants["quantized"])
    expected = operate(plain, quantized.variants["quantized"].inputs[0](x), weight, None)
    assert torch.equal(quantized(x), expected)
    packed = pack_layer(quantized, quantized.variants["quantized"])
    for other in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert isinstance(other, kind)
        assert torch.equal(other(x), expected)
        assert vars(other).get("name") == vars(plain).get("name")
    make_plain(packed)
    assert type(packed) is kind


def test_a_subclass_whose_convolution_is_its_own_or_whose_weight_is_computed_is_not_quantizable() -> None:
    class Padded(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(F.pad(input, (1, 1)), weight, bias)

    assert not is_quantizable(Padded(1, 1, 1))
    assert not is_quantizable(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    assert not is_quantizable(torch.nn.utils.weight_norm(nn.Linear(2, 2)))


# --- modes ---------------------------------------------------------------------------------------------------------


@every_layer
def test_full_precision_has_the_bits_of_the_plain_layer(kind: str) -> None:
    plain, quantized, x = make_ready(kind)
    assert torch.equal(quantized(x), plain(x))
    with running(quantized, "nearest"):
        quantized(x)
    assert torch.equal(quantized(x), plain(x))


@every_layer
@pytest.mark.parametrize(
    "granularity", [Granularity("tensor"), Granularity("channel"), Granularity("group", 3)], ids=lambda g: g.kind
)
def test_nearest_is_quantization_by_hand(kind: str, granularity: Granularity) -> None:
    plain, quantized, x = make_ready(kind, granularity)
    weight = plain.weight
    flat = {"tensor": weight.reshape(1, -1), "channel": weight.flatten(1), "group": weight.reshape(-1, 3)}
    rows = flat[granularity.kind]
    on_grid = Quantizer(E2M1, rows.abs().amax(1, keepdim=True) / 6)(rows).reshape(weight.shape)
    inputs = Quantizer(E4M3, x.abs().max() / 480)(x)
    with running(quantized, "nearest"):
        assert torch.equal(quantized(x), operate(plain, inputs, on_grid, plain.bias))
    assert not torch.equal(on_grid, weight)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("what", ["weights", "inputs"])
def test_weights_or_inputs_alone_can_be_quantized(kind: str, what: str) -> None:
    plain, quantized, x = make_ready(kind)
    both = cast(LayerQuantization, quantized.variants["nearest"])
    alone = LayerQuantization(**{what: list(getattr(both, what))})
    quantized.variants["nearest"] = alone
    weight = both.weights[0](plain.weight.flatten(1)).reshape(plain.weight.shape) if what == "weights" else plain.weight
    inputs = both.inputs[0](x) if what == "inputs" else x
    with running(quantized, "nearest"):
        assert torch.equal(quantized(x), operate(plain, inputs, weight, plain.bias))


@pytest.mark.parametrize("what", ["weights", "inputs"])
def test_running_a_mode_leaves_the_parameters_of_a_layer_alone(what: str) -> None:
    _, quantized, x = make_ready()
    both = cast(LayerQuantization, quantized.variants["nearest"])
    quantized.variants["nearest"] = LayerQuantization(**{what: list(getattr(both, what))})
    before = (list(quantized.state_dict()), [name for name, _ in quantized.named_parameters(remove_duplicate=False)])
    with running(quantized, "nearest"):
        quantized(x)
        during = (list(quantized.state_dict()), [n for n, _ in quantized.named_parameters(remove_duplicate=False)])
    assert during == before


@pytest.mark.parametrize("kind", ["linear_tokens", "conv2d"])
def test_dynamic_input_scales_are_of_each_token_or_image(kind: str) -> None:
    plain, quantized, x = make_ready(kind)
    x = x * torch.tensor([1.0, 50.0]).reshape(2, *[1] * (x.ndim - 1))
    quantized.variants["nearest"] = LayerQuantization((), [Quantizer(E4M3, None, token_dims=quantized.token_dims)])
    tokens = x.reshape(-1, 6) if kind == "linear_tokens" else x.flatten(1)
    by_hand = torch.stack([Quantizer(E4M3, t.abs().max() / 480)(t) for t in tokens]).reshape(x.shape)
    with running(quantized, "nearest"):
        assert torch.equal(quantized(x), plain(by_hand))


def test_bias_of_the_quantization_replaces_that_of_the_layer() -> None:
    plain, quantized, x = make_ready("conv2d")
    bias = torch.arange(4.0)
    learned = cast(LayerQuantization, quantized.variants["quantized"])
    learned.set_bias(bias)
    with running(quantized, "nearest"):
        nearest = quantized(x)
    with running(quantized, "quantized"):
        difference = quantized(x) - nearest
    expected = (bias - plain.bias)[None, :, None, None].expand_as(difference)
    assert torch.allclose(difference, expected, atol=1e-6)
    assert torch.equal(quantized(x), plain(x))
    assert learned.bias is not None
    assert not learned.bias.requires_grad


def test_a_weight_that_a_cast_rounds_is_quantized_anew() -> None:
    """A hair above the middle of 1 and 1.5 in float32, at the middle in bfloat16, which goes to 1."""
    _, layer, x = make_ready()
    nearest = layer.variants["nearest"]
    nearest.weights[0].scale.fill_(1.0)
    layer.weight.fill_(1.25 + 2**-12)
    layer.set_mode("nearest")
    layer.bias.zero_()
    assert torch.equal(layer(x), F.linear(nearest.inputs[0](x), torch.full((4, 6), 1.5), layer.bias))
    layer.bfloat16().float()
    quantized = nearest.inputs[0](x)
    assert torch.equal(layer(x), F.linear(quantized, torch.ones(4, 6), layer.bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_layer_keeps_its_type(dtype: torch.dtype) -> None:
    layer, x = make_layer("linear")
    layer, x = layer.to(dtype), x.to(dtype)
    plain = copy.deepcopy(layer)
    quantized = make_quantized(layer, Granularity())
    quantization = quantization_of(quantized, x)
    assert quantization.weights[0].scale.dtype == torch.float32
    quantized.variants["nearest"] = quantization
    assert torch.equal(quantized(x), plain(x))
    with running(quantized, "nearest"):
        result = quantized(x)
    assert result.dtype == dtype
    weight = quantization.weights[0](plain.weight.float()).to(dtype)
    assert torch.equal(result, F.linear(quantization.inputs[0](x), weight, plain.bias))


# --- parts of the input channels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", unsplit)
def test_parts_of_the_input_channels_are_quantized_apart(kind: str) -> None:
    layer, x = make_layer(kind)
    dim = -1 if kind.startswith("linear") else 1
    first, second = x.split((4, 2), dim=dim)
    x = torch.cat([first, 100 * second], dim=dim)
    layer.weight.data[:, 4:] *= 1e-3
    plain = copy.deepcopy(layer)
    quantized = make_quantized(layer, Granularity(), splits=(4, 2))
    quantized.variants["nearest"] = quantization_of(quantized, x)

    assert torch.equal(quantized.from_rows(quantized.weight_rows()), plain.weight)
    parts = []
    for part in (plain.weight[:, :4], plain.weight[:, 4:]):
        flat = part.flatten(1)
        parts.append(Quantizer(E2M1, flat.abs().amax(1, keepdim=True) / 6)(flat).reshape(part.shape))
    weight = torch.cat(parts, 1)
    inputs = torch.cat([Quantizer(E4M3, p.abs().max() / 480)(p) for p in x.split((4, 2), dim=dim)], dim=dim)
    with running(quantized, "nearest"):
        assert torch.equal(quantized(x), operate(plain, inputs, weight, plain.bias))
    # A common clip of both parts would round the smaller one away.
    assert weight[:, 4:].count_nonzero() > 0
    common = Quantizer(E2M1, plain.weight.abs().flatten(1).amax(1, keepdim=True) / 6)(plain.weight.flatten(1))
    assert common.reshape(weight.shape)[:, 4:].count_nonzero() == 0


@pytest.mark.parametrize("kind", ["conv2d_grouped", "conv2d_depthwise"])
def test_grouped_convolutions_are_not_split(kind: str) -> None:
    layer, x = make_layer(kind)
    plain = copy.deepcopy(layer)
    quantized = make_quantized(layer, Granularity(), splits=(4, 2))
    assert quantized.splits == (plain.weight.shape[1],)
    quantized.variants["nearest"] = quantization_of(quantized, x)
    quantization = cast(LayerQuantization, quantized.variants["nearest"])
    assert (len(quantization.weights), len(quantization.inputs)) == (1, 1)
    with running(quantized, "nearest"):
        weight = quantization.weights[0](plain.weight.flatten(1)).reshape(plain.weight.shape)
        assert torch.equal(quantized(x), operate(plain, quantization.inputs[0](x), weight, plain.bias))


def test_parts_that_are_not_all_input_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3\) do not add up to 6"):
        make_quantized(nn.Linear(6, 4), Granularity(), splits=(4, 3))


# --- switching -----------------------------------------------------------------------------------------------------


def test_running_restores_every_mode_even_after_an_error() -> None:
    layers = [make_ready()[1] for _ in range(3)]
    network = nn.Sequential(nn.Sequential(*layers[:2]), layers[2])
    layers[1].set_mode("nearest")
    with running(network, "quantized"):
        assert [layer.mode for layer in layers] == ["quantized"] * 3
        with running(network[0], "full_precision"):
            assert [layer.mode for layer in layers] == ["full_precision"] * 2 + ["quantized"]
        assert [layer.mode for layer in layers] == ["quantized"] * 3
    assert [layer.mode for layer in layers] == ["full_precision", "nearest", "full_precision"]
    with pytest.raises(RuntimeError, match="stop"), running(network, "quantized"):
        raise RuntimeError("stop")
    assert [layer.mode for layer in layers] == ["full_precision", "nearest", "full_precision"]


def test_layers_without_the_variant_run_in_full_precision() -> None:
    plain, ready, x = make_ready()
    bare = make_quantized(copy.deepcopy(plain), Granularity())
    network = nn.ModuleList([ready, bare])
    with running(network, "nearest"):
        assert torch.equal(bare(x), plain(x))
        assert not torch.equal(ready(x), plain(x))


def test_modes_do_not_leak_into_each_other() -> None:
    """A layer remembers the quantized weight of its mode; switching must forget it."""
    _, quantized, x = make_ready()
    learned = cast(LayerQuantization, quantized.variants["quantized"])
    learned.codes = [
        torch.zeros_like(q.encode(r)) for q, r in zip(learned.weights, quantized.weight_rows(), strict=True)
    ]
    outputs = {}
    for mode in ("nearest", "quantized", "full_precision", "quantized", "nearest", "full_precision"):
        with running(quantized, mode):
            once, twice = quantized(x), quantized(x)
        assert torch.equal(once, twice)
        assert torch.equal(outputs.setdefault(mode, once), once)
    assert torch.equal(outputs["quantized"], quantized.bias.expand(5, 4))
    assert not torch.equal(outputs["nearest"], outputs["full_precision"])


def test_copies_of_a_quantization_are_independent() -> None:
    _, quantized, _ = make_ready()
    nearest, learned = (cast(LayerQuantization, quantized.variants[m]) for m in ("nearest", "quantized"))
    learned.weights[0].scale.mul_(2)
    learned.set_bias(torch.ones(4))
    assert torch.equal(nearest.weights[0].scale * 2, learned.weights[0].scale)
    assert nearest.bias is None


# --- learning ------------------------------------------------------------------------------------------------------


def start_learning(
    kind: str = "linear", splits: tuple[int, ...] | None = None
) -> tuple[nn.Module, QuantizedLayer, Tensor]:
    layer, x = make_layer(kind)
    plain = copy.deepcopy(layer)
    quantized = make_quantized(layer, Granularity(), splits)
    quantization = quantization_of(quantized, x)
    quantized.variants["quantized"] = quantization
    quantized.set_mode("quantized")
    quantization.start_learning(quantized.weight_rows(), scale_aware=False)
    return plain, quantized, x


@pytest.mark.parametrize(("kind", "splits"), [("linear", None), ("conv2d", None), ("conv2d", (4, 2))])
def test_learning_starts_near_full_precision_and_reaches_every_variable(
    kind: str, splits: tuple[int, ...] | None
) -> None:
    plain, quantized, x = start_learning(kind, splits)
    quantization = cast(LayerQuantization, quantized.variants["quantized"])
    for quantizer in [*quantization.weights, *quantization.inputs]:
        quantizer.learn_scale()
    weight = quantized.quantized_weight(quantization).detach()
    step = 2 / 6 * plain.weight.abs().max()
    assert (weight - plain.weight).abs().max() <= 0.011 * step
    quantized(x).square().sum().backward()
    parameters = dict(quantization.named_parameters())
    parts = len(quantized.splits)
    assert sum(name.endswith(".v") for name in parameters) == parts
    assert sum(name.endswith("log_gain") for name in set(parameters) if "roundings" not in name) == 2 * parts
    assert all(p.grad is not None and p.grad.count_nonzero() > 0 for p in parameters.values())


@pytest.mark.parametrize(("kind", "splits"), [("linear", None), ("conv2d", None), ("conv2d", (4, 2))])
def test_finished_learning_keeps_the_decisions_as_codes(kind: str, splits: tuple[int, ...] | None) -> None:
    _, quantized, x = start_learning(kind, splits)
    quantization = cast(LayerQuantization, quantized.variants["quantized"])
    for quantizer in [*quantization.weights, *quantization.inputs]:
        quantizer.learn_scale()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in quantization.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(3 * noise if parameter.ndim == 2 and parameter.shape[1] > 1 else 0.1 * noise)
        for rounding in quantization.roundings:
            rounding.hardness = 1.0
        hard = quantized(x)
    expected_codes = [r.codes() for r in quantization.roundings]
    scales = [q.current_scale().detach() for q in [*quantization.weights, *quantization.inputs]]
    quantization.finish_learning()
    assert len(quantization.roundings) == 0
    assert not any(p.requires_grad for p in quantization.parameters())
    assert quantization.codes is not None
    assert all(torch.equal(a, b) for a, b in zip(quantization.codes, expected_codes, strict=True))
    frozen = [q.scale for q in [*quantization.weights, *quantization.inputs]]
    assert all(torch.equal(a, b) for a, b in zip(frozen, scales, strict=True))
    assert torch.equal(quantized(x), hard)
    nearest = [q.encode(r) for q, r in zip(quantization.weights, quantized.weight_rows(), strict=True)]
    assert any(not torch.equal(a, b) for a, b in zip(quantization.codes, nearest, strict=True))


def test_codes_are_what_runs_not_the_weight() -> None:
    plain, quantized, x = make_ready("conv2d")
    learned = cast(LayerQuantization, quantized.variants["quantized"])
    (quantizer,) = learned.weights
    codes = torch.randint(0, 16, (4, 54), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    learned.codes = [codes]
    weight = (E2M1.decode(codes) * quantizer.scale).reshape(plain.weight.shape)
    with running(quantized, "quantized"):
        assert torch.equal(quantized(x), operate(plain, learned.inputs[0](x), weight, plain.bias))


def test_finishing_without_learning_leaves_nearest_rounding() -> None:
    _, quantized, x = make_ready()
    learned = cast(LayerQuantization, quantized.variants["quantized"])
    learned.finish_learning()
    assert learned.codes is None
    with running(quantized, "nearest"):
        expected = quantized(x)
    with running(quantized, "quantized"):
        assert torch.equal(quantized(x), expected)


# --- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_codes", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_state_reads_back_to_a_layer_that_computes_the_same(with_codes: bool, with_bias: bool) -> None:
    layer, x = make_layer("conv2d")
    quantized = make_quantized(layer, Granularity("group", 3), splits=(4, 2))
    quantization = quantization_of(quantized, x, w=INT4)
    quantization.inputs[1] = Quantizer(UE4M4, torch.tensor(0.01), torch.tensor(-0.3))
    if with_codes:
        quantization.start_learning(quantized.weight_rows(), scale_aware=True)
        with torch.no_grad():
            quantization.roundings[0].v.neg_()
        quantization.finish_learning()
    if with_bias:
        quantization.set_bias(torch.arange(4.0))
    again = LayerQuantization.from_state(quantization.to_state(), torch.device("cpu"))
    quantized.variants["nearest"] = quantization
    quantized.variants["quantized"] = again
    with running(quantized, "nearest"):
        expected = quantized(x)
    with running(quantized, "quantized"):
        assert torch.equal(quantized(x), expected)
    assert again.to_state().keys() == quantization.to_state().keys()
    assert (again.codes is not None) == with_codes
    assert not any(p.requires_grad for p in again.parameters())


def test_state_holds_tensors_and_plain_types_only() -> None:
    _, quantized, _ = start_learning()
    quantization = cast(LayerQuantization, quantized.variants["quantized"])
    quantization.finish_learning()

    def check(value: object) -> None:
        if isinstance(value, dict):
            for item in value.values():
                check(item)
        elif isinstance(value, list):
            for item in value:
                check(item)
        else:
            assert value is None or type(value) in (int, float, str, torch.Tensor)

    check(quantization.to_state())
