"""Plain, calibrated and packed modules: what each change leaves behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_attention import TwoCalls
from test_calibrated import LAYERS, make_layer, quantization_of
from torch import nn

from fpq_lightning.formats.numbers import parse_format
from fpq_lightning.nn.calibrated import LayerQuantization, running
from fpq_lightning.nn.convert import (
    make_attention_empty,
    make_attention_plain,
    make_attention_quantized,
    make_plain,
    make_quantized,
    pack_attention,
    pack_layer,
)
from fpq_lightning.nn.packed_layer import PackedLayer, set_arithmetic
from fpq_lightning.nn.swap import SwappedModule, swap
from fpq_lightning.quantization.quantizer import Granularity, Quantizer


def state(module: nn.Module) -> dict[str, object]:
    """What a module holds, without the values of tensors."""
    inner = {k: set(v) for k, v in vars(module).items() if k in ("_parameters", "_buffers", "_modules")}
    return {**dict.fromkeys(vars(module)), **inner, "others": set(module._non_persistent_buffers_set)}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_made_plain_holds_what_a_plain_layer_does_and_what_others_gave_it(kind: str, packed: bool) -> None:
    layer, x = make_layer(kind)
    layer.of_others = 7
    before, plain = state(layer), type(layer)
    quantized = make_quantized(layer, Granularity())
    quantized.variants["quantized"] = quantization_of(quantized, x)
    with running(quantized, "quantized"):
        expected = quantized(x)
        weight = quantized.quantized_weight(quantized.variants["quantized"])
    if packed:
        low_bit = pack_layer(quantized, quantized.variants["quantized"])
        assert not any(name in vars(low_bit) for name in ("granularity", "mode", "_effective_weight"))
        assert torch.equal(low_bit(x), expected)
        set_arithmetic(low_bit, "simulated")
    make_plain(layer)  # type: ignore[arg-type]
    assert type(layer) is plain
    assert state(layer) == before
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("packed", [False, True])
def test_a_module_whose_attention_is_made_plain_is_as_before(packed: bool) -> None:
    torch.manual_seed(0)
    module, inputs = TwoCalls(), {"x": torch.randn(2, 5, 6), "other": torch.randn(2, 8, 6)}
    before, expected = state(module), module(**inputs)
    quantized = make_attention_quantized(module, "inner", 2)
    quantizers = [Quantizer(parse_format("e2m1"), torch.tensor(0.1 * (i + 1))) for i in range(8)]
    quantized.variants["quantized"] = LayerQuantization(inputs=quantizers)
    with running(quantized, "quantized"):
        low_bit = quantized(**inputs)
    assert not torch.allclose(low_bit, expected)
    if packed:
        made = pack_attention(quantized)
        assert not any(name in vars(made) for name in ("mode", "observers"))
        assert set(made.state_dict()) - set(TwoCalls().state_dict()) == {f"operands.{k}.scale" for k in range(8)}
        for other in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(other(**inputs), low_bit)
        empty = make_attention_empty(TwoCalls(), "inner", made.describe())
        empty.load_state_dict(made.state_dict(), assign=True)
        assert torch.equal(empty(**inputs), low_bit)
    make_attention_plain(module)  # type: ignore[arg-type]
    assert type(module) is TwoCalls
    assert state(module) == before
    assert torch.equal(module(**inputs), expected)


def test_what_a_class_declares_must_be_given_and_nothing_else() -> None:
    class Counted(SwappedModule, nn.Linear):
        plain = nn.Linear
        calls: int

    layer = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="calls"):
        swap(layer, Counted)
    with pytest.raises(TypeError, match="times"):
        swap(layer, Counted, calls=0, times=1)
    assert type(layer) is nn.Linear
    assert swap(layer, Counted, calls=3) is layer
    assert vars(layer)["calls"] == 3


@pytest.mark.parametrize("kind", ["linear", "conv2d_dilated"])
def test_the_type_of_a_layer_makes_plain_layers_and_copies_of_its_own_kind(kind: str) -> None:
    """As adapters do with the type of the layer that they adapt."""
    layer, x = make_layer(kind)
    plain = type(layer)
    quantized = make_quantized(layer, Granularity())
    quantized.variants["quantized"] = quantization_of(quantized, x)
    sizes = (6, 4) if kind == "linear" else (6, 4, 3)
    assert type(type(quantized)(*sizes, bias=False)) is plain
    packed = pack_layer(quantized, quantized.variants["quantized"])
    assert type(type(packed)(*sizes)) is plain
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert isinstance(other, PackedLayer)
        assert torch.equal(other(x), packed(x))


def test_a_quantized_layer_is_not_quantized_again() -> None:
    layer, x = make_layer("linear")
    quantized = make_quantized(layer, Granularity())
    quantized.variants["quantized"] = quantization_of(quantized, x)
    with pytest.raises(ValueError, match="QuantizedLinear is quantized already"):
        make_quantized(quantized, Granularity())
    packed = pack_layer(quantized, quantized.variants["quantized"])
    with pytest.raises(ValueError, match="PackedLinear is quantized already"):
        make_quantized(packed, Granularity())
