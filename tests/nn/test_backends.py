"""Packed layers on their paths: real low-bit products against float64, and which path is taken where."""

from __future__ import annotations

import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from fpq_lightning.formats.numbers import FAMILIES, FORMATS, parse_format
from fpq_lightning.kernels import reference as decoding
from fpq_lightning.nn.backends import fp8, weight_only
from fpq_lightning.nn.backends.hardware import Hardware, hardware_of
from fpq_lightning.nn.backends.paths import PATHS, Arithmetic, choose, fitting_paths
from fpq_lightning.nn.convert import make_packed, make_plain
from fpq_lightning.nn.packed_layer import PackedLayer, set_arithmetic
from fpq_lightning.nn.packed_weight import PackedWeight
from fpq_lightning.quantization.quantizer import Quantizer

HOPPER = Hardware((9, 0), kernels=True)
E4M3 = "float8_e4m3fn"


def packed_linear(
    fmt: str = E4M3,
    outputs: int = 32,
    splits: tuple[int, ...] = (48,),
    per_channel: bool = True,
    inputs: str | None = E4M3,
    dynamic: bool = False,
    layer: nn.Module | None = None,
) -> PackedLayer:
    torch.manual_seed(0)
    form = parse_format(fmt)
    plain = nn.Linear(sum(splits), outputs) if layer is None else layer
    weights = []
    for n in splits:
        rows = torch.randn(outputs, n * plain.weight[0, 0].numel()) * torch.logspace(-2, 1, outputs)[:, None]
        top = rows.abs().amax(1, keepdim=True) if per_channel else rows.abs().amax().reshape(1, 1)
        quantizer = Quantizer(form, top / form.max)
        weights.append(PackedWeight.of(quantizer, quantizer.encode(rows), (outputs, n, *plain.weight.shape[2:])))
    scales = [None if dynamic else torch.tensor(0.01 * (i + 1)) for i in range(len(splits))]
    quantizers = [] if inputs is None else [Quantizer(parse_format(inputs), scale) for scale in scales]
    return make_packed(plain.bfloat16(), splits, weights, quantizers)


def planned(
    layer: PackedLayer, hardware: Hardware, dtype: torch.dtype, arithmetic: Arithmetic = "native"
) -> tuple[str, str]:
    """The paths of a layer on inputs of few rows, and of many."""
    plan, channels = choose(fitting_paths(layer.operands), hardware, dtype, arithmetic), layer.shape[1]
    rows = (weight_only.MAX_ROWS, weight_only.MAX_ROWS + 1)
    few, many = (next(name for name in plan if PATHS[name].takes_rows(n * channels, channels)) for n in rows)
    return few, many


def exact(layer: PackedLayer, x: Tensor) -> Tensor:
    """The layer in float64, its input quantized in float32."""
    quantized = layer.quantize_input(x.float(), layer.inputs).double()
    return quantized @ layer.decode_weight().double().T + layer.bias.double()  # type: ignore[union-attr]


def magnitude(layer: PackedLayer, x: Tensor) -> Tensor:
    """The sums of what the layer adds up, without signs."""
    products = layer.quantize_input(x.float(), layer.inputs).abs() @ layer.decode_weight().abs().T
    return products + layer.bias.abs()  # type: ignore[union-attr]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("splits", [(48,), (32, 16)])
@pytest.mark.parametrize("fmt", [E4M3, "e2m1", "e3m0", "e1m2", "float6_e3m2fn", "float6_e2m3fn"])
def test_fp8_products_are_those_of_the_quantized_operands(
    fmt: str, splits: tuple[int, ...], per_channel: bool, dynamic: bool
) -> None:
    layer = packed_linear(fmt, splits=splits, per_channel=per_channel, dynamic=dynamic)
    x = torch.randn(3, 5, sum(splits)).bfloat16()
    x[0, 0, 0] = 300.0  # beyond the clip: saturates
    assert fp8.fits(layer.operands)
    out, reference = fp8.run(x, layer.operands), exact(layer, x)
    assert out.dtype == torch.bfloat16
    assert out.shape == reference.shape
    # Sums in float32; each part's and the result are rounded to bfloat16, by 2^-8 of themselves at most.
    assert ((out.double() - reference).abs() <= 2**-7 * magnitude(layer, x)).all()


def test_fp8_products_see_every_bit_of_the_operands() -> None:
    """Small integers have exact products and sums, so that one wrong code shows."""
    layer = packed_linear("e2m1", outputs=16, splits=(16,))
    one = torch.eye(16).bfloat16()
    layer.inputs[0].scale = torch.tensor(1.0)
    layer.bias = None
    assert torch.equal(fp8.run(one, layer.operands).float(), layer.decode_weight().T.bfloat16().float())


@pytest.mark.parametrize("name", [*FORMATS.names, *(m for f in FAMILIES for m in f.members if m[0] != "u"), "int4"])
def test_a_format_embeds_in_e4m3_when_a_cast_keeps_its_values(name: str) -> None:
    values = parse_format(name).grid.numpy()
    kept = bool((values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) == values).all())
    assert fp8.embeds(parse_format(name)) == kept


@pytest.mark.parametrize(
    "options",
    [
        {"inputs": "e4m3"},  # of the free convention, with 480
        {"inputs": None},
        {"fmt": "e4m3"},
        {"outputs": 24},
        {"splits": (24, 24)},
        {"layer": nn.Conv1d(48, 32, 1)},
        {"layer": nn.Conv2d(48, 32, 3, dilation=2)},
        {"layer": nn.Conv2d(48, 32, 3, stride=(1, 2))},
        {"layer": nn.Conv2d(48, 32, 3, padding="same")},
        {"layer": nn.Conv2d(48, 32, 3, padding=1, padding_mode="circular")},
        {"layer": nn.Conv2d(48, 32, 1), "splits": (24, 24)},
        {"layer": nn.Conv2d(48, 32, 1), "dynamic": True},
    ],
)
def test_what_tensor_cores_cannot_multiply_is_no_fp8_product(options: dict) -> None:
    layer = packed_linear(**options)
    assert planned(layer, HOPPER, torch.bfloat16)[1] == "decode"


def test_paths_follow_the_device_the_type_and_the_wish() -> None:
    def paths(fmt: str, hardware: Hardware, dtype: torch.dtype, arithmetic: Arithmetic = "native") -> tuple[str, str]:
        return planned(packed_linear(fmt), hardware, dtype, arithmetic)

    ada_without_triton, ampere = Hardware((8, 9)), Hardware((8, 6), kernels=True)
    assert paths("e2m1", HOPPER, torch.bfloat16) == ("weight_only", "fp8")
    assert paths("e2m1", ada_without_triton, torch.bfloat16) == ("fp8", "fp8")
    assert paths("e2m1", ampere, torch.bfloat16) == ("weight_only", "decode")
    assert paths("e2m1", HOPPER, torch.float16) == ("weight_only", "decode")
    assert paths("e2m1", HOPPER, torch.float32) == ("decode", "decode")
    assert paths("e2m1", HOPPER, torch.bfloat16, "simulated") == ("decode", "decode")
    assert paths(E4M3, HOPPER, torch.bfloat16) == ("fp8", "fp8")
    assert paths("e3m4", HOPPER, torch.bfloat16) == ("decode", "decode")
    assert paths("e2m2", HOPPER, torch.bfloat16) == ("fp8", "fp8")  # of five bits
    assert hardware_of(torch.device("cpu")) == Hardware()
    convolution = packed_linear(outputs=24, layer=nn.Conv2d(48, 24, 3))
    for hardware, path in (
        (HOPPER, "fp8_conv"),
        (Hardware((9, 0)), "decode"),
        (Hardware((8, 9), kernels=True), "decode"),
    ):
        assert planned(convolution, hardware, torch.bfloat16) == (path, path)
    for splits in ((48,), (32, 16)):
        strided = packed_linear(splits=splits, outputs=24, layer=nn.Conv2d(48, 24, 3, stride=2))
        assert fitting_paths(strided.operands) == ("decode",)  # 16 channels would be read with those of the next pixel


def test_a_layer_takes_its_path_anew_when_the_wish_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpq_lightning.nn.backends.paths.hardware_of", lambda device: Hardware((9, 0)))
    layer, x = packed_linear("e2m1", splits=(32, 16)), torch.randn(100, 48).bfloat16()
    assert torch.equal(layer(x), fp8.run(x, layer.operands))
    set_arithmetic(layer, "simulated")
    assert torch.equal(layer(x), layer.simulate(x))
    assert not torch.equal(layer.simulate(x), fp8.run(x, layer.operands))  # or this test says nothing
    set_arithmetic(layer, "native")
    assert torch.equal(layer(x.float()), layer.simulate(x.float()))


def test_what_is_kept_of_a_layer_goes_when_others_scales_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpq_lightning.nn.backends.paths.hardware_of", lambda device: Hardware((9, 0)))
    layer, other, x = packed_linear(), packed_linear(), torch.randn(100, 48).bfloat16()
    other.weights[0].scale.mul_(3)
    other.inputs[0].scale.mul_(2)
    before = layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(layer(x), before)


def test_gradients_go_through_the_decoded_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpq_lightning.nn.backends.paths.hardware_of", lambda device: Hardware((9, 0)))
    layer, x = packed_linear("e2m1", inputs=E4M3), torch.randn(4, 48).bfloat16().requires_grad_()
    layer(x).sum().backward()
    inside = x.detach().float().abs() <= layer.inputs[0].clip
    expected = torch.where(inside, layer.decode_weight(torch.bfloat16).float().sum(0), 0.0)
    torch.testing.assert_close(x.grad.float(), expected, rtol=2e-2, atol=2e-2)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 0, 48), (1, 48), (2, 3, 4, 48)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_inputs_of_any_shape_are_taken(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dynamic: bool) -> None:
    monkeypatch.setattr("fpq_lightning.nn.backends.paths.hardware_of", lambda device: Hardware((9, 0)))
    layer = packed_linear(dynamic=dynamic).requires_grad_(False)
    assert layer(torch.randn(shape).bfloat16()).shape == (*shape[:-1], 32)


def test_layers_that_accelerate_offloads_run_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpq_lightning.nn.backends.paths.hardware_of", lambda device: Hardware((9, 0)))
    layer, x = packed_linear("e2m1").requires_grad_(False), torch.randn(100, 48).bfloat16()
    expected = layer.simulate(x)
    cpu_offload(layer, execution_device=torch.device("cpu"), offload_buffers=True)
    assert torch.equal(layer(x), expected)


def test_a_plan_is_neither_pickled_nor_left_to_another_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpq_lightning.nn.backends.paths.hardware_of", lambda device: Hardware((9, 0)))
    layer, x = packed_linear("e2m1"), torch.randn(100, 48).bfloat16()
    layer(x)
    copied = pickle.loads(pickle.dumps(layer))
    monkeypatch.setattr("fpq_lightning.nn.backends.paths.hardware_of", lambda device: Hardware())
    assert torch.equal(copied(x), layer.simulate(x))
    set_arithmetic(layer, "simulated")
    make_plain(layer)
    assert "_plan" not in vars(layer)
    assert "arithmetic" not in vars(layer)


def test_an_unknown_arithmetic_is_refused() -> None:
    with pytest.raises(ValueError, match="no arithmetic 'exact'"):
        set_arithmetic(packed_linear(), "exact")  # type: ignore[arg-type]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("fmt", [E4M3, "e2m1", "e3m4"])
@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_layer_computes_the_same(
    fmt: str, warm: bool, per_channel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpq_lightning.nn.backends.paths.hardware_of", lambda device: Hardware((9, 0)))
    layer = packed_linear(fmt, splits=(32, 16), per_channel=per_channel).requires_grad_(False)
    x = torch.randn(100, 48).bfloat16()
    x[0, 0], x[1, 1], x[2, 2] = 300.0, -300.0, float("nan")
    torch.compiler.reset()
    if warm:
        layer(x)
    compiled, eager = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
    if per_channel and fmt != "e3m4":  # scales of channels are multiplied after the product's rounding to bfloat16
        assert eager[2].isnan().all()
        assert compiled[2].isnan().all()
        compiled[2], eager[2], x[2] = 0.0, 0.0, 0.0
        assert ((compiled - eager).abs() <= 2**-7 * magnitude(layer, x)).all()
    else:
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0, equal_nan=True)


def test_layers_can_be_exported_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpq_lightning.nn.backends.paths.hardware_of", lambda device: Hardware((9, 0)))
    for cached in (fp8._kept_one, fp8._kept_ones, decoding.e4m3_codes, decoding.code_values):
        cached.cache_clear()
    for fmt in (E4M3, "e2m1", "e3m4"):
        layer, x = packed_linear(fmt).requires_grad_(False), torch.randn(100, 48).bfloat16()
        torch.compiler.reset()
        for _ in range(2):
            exported = torch.export.export(layer, (x,))
            assert ((exported.module()(x) - layer(x)).abs() <= 2**-7 * magnitude(layer, x)).all()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert ((compiled - layer(x)).abs() <= 2**-7 * magnitude(layer, x)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_type_is_of_no_account(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpq_lightning.nn.backends.paths.hardware_of", lambda device: Hardware((9, 0)))
    layer, x = packed_linear().requires_grad_(False), torch.randn(100, 48).bfloat16()
    for cached in (fp8._kept_one, fp8._kept_ones):
        cached.cache_clear()
    torch.compiler.reset()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        eager, compiled = layer(x), torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(eager, layer(x))
    assert ((compiled - eager).abs() <= 2**-7 * magnitude(layer, x)).all()


@pytest.mark.parametrize(
    "formats", [("e2m1", "e1m2", "e3m0"), ("e3m4", "e2m5", "e4m3"), ("e1m2", E4M3, "float6_e2m3fn", "e3m4")]
)
def test_layers_of_many_formats_compile_together(formats: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpq_lightning.nn.backends.paths.hardware_of", lambda device: Hardware((9, 0)))
    layers = [packed_linear(fmt, outputs=48, per_channel=False) for fmt in formats]
    model, x = nn.Sequential(*layers).requires_grad_(False), torch.randn(100, 48).bfloat16()
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
