"""Quantizers against float64 arithmetic on `offset + scale * grid` and the gradient formulas of LSQ."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fpq_lightning.formats.numbers import FloatFormat, Format, IntFormat, parse_format
from fpq_lightning.quantization.quantizer import Granularity, Quantizer

NAMES = ["e4m3", "e5m2", "e2m5", "e2m1", "e1m2", "e3m0", "ue4m4", "ue2m6", "ue3m1", "int8", "int4", "uint8", "uint4"]
NAMES += ["float8_e4m3fn", "float8_e5m2", "float6_e2m3fn", "float4_e2m1fn"]
FORMATS = [parse_format(name) for name in NAMES]
SIGNED_FLOATS = [f for f in FORMATS if f.signed and isinstance(f, FloatFormat)]

real_scales = st.floats(2**-20, 2**13, width=32).filter(lambda s: math.frexp(s)[0] != 0.5)
seeds = st.integers(0, 2**31 - 1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wide(fmt: Format, scale: Tensor, offset: Tensor, n: int, seed: int) -> Tensor:
    """Values of a quantizer's range and somewhat beyond, of all magnitudes."""
    x = random(n, seed=seed) * torch.rand(n, generator=torch.Generator().manual_seed(seed)) ** 3
    return x * scale * fmt.max + offset


def nearest(x: Tensor, points: Tensor) -> Tensor:
    """The distance of each element to the nearest of the points, float64."""
    return (x.double()[..., None] - points.double()).abs().amin(-1)


# --- granularity ---------------------------------------------------------------------------------------------------


def test_rows_of_a_tensor_of_its_channels_and_of_groups() -> None:
    weight = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    assert torch.equal(Granularity("tensor").rows(weight), torch.arange(24)[None])
    assert torch.equal(Granularity("channel").rows(weight), torch.arange(24).reshape(2, 12))
    assert torch.equal(Granularity("group", 4).rows(weight), torch.arange(24).reshape(6, 4))
    assert Granularity("group", 12).rows(weight).shape == (2, 12)


def test_group_size_that_does_not_divide_a_channel_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"mid\.proj: group_size 5 does not divide its 12"):
        Granularity("group", 5).rows(torch.zeros(5, 3, 2, 2), name="mid.proj")
    with pytest.raises(ValueError, match="group_size 24 does not divide its 12"):  # a group never spans two channels
        Granularity("group", 24).rows(torch.zeros(2, 12))


@pytest.mark.parametrize(
    ("kind", "size"), [("group", None), ("channel", 4), ("tensor", 4), ("group", 0), ("group", -2), ("row", None)]
)
def test_granularity_that_makes_no_sense_is_refused(kind: str, size: int | None) -> None:
    with pytest.raises(ValueError, match="gr"):
        Granularity(kind, size)  # type: ignore[arg-type]


# --- values --------------------------------------------------------------------------------------------------------


@given(st.sampled_from(FORMATS), real_scales, st.sampled_from([None, -1.0, 0.3]), seeds)
def test_result_is_the_nearest_of_offset_plus_scale_times_grid(
    fmt: Format, scale: float, shift: float | None, seed: int
) -> None:
    s = torch.tensor(scale)
    offset = None if shift is None else s * fmt.max * shift
    quantizer = Quantizer(fmt, s, offset)
    shift_by = torch.zeros(()) if offset is None else offset
    x = wide(fmt, s, shift_by, 200, seed)
    result = quantizer(x)
    points = fmt.grid * s + shift_by
    assert torch.isin(result, points).all()
    # In float64; the slack is for the float32 division and addition on the way to the unit scale.
    slack = 1e-6 * (x.double().abs() + shift_by.abs().double())
    assert ((x - result.double()).abs() <= nearest(x, points) + slack).all()


@given(st.sampled_from(FORMATS), real_scales, st.sampled_from([None, -1.0, 0.3]))
def test_clip_and_the_other_end_are_their_own_quantization(fmt: Format, scale: float, shift: float | None) -> None:
    s = torch.tensor(scale)
    offset = None if shift is None else s * fmt.max * shift
    quantizer = Quantizer(fmt, s, offset)
    clip = quantizer.clip
    assert clip.item() == pytest.approx(scale * fmt.max * (1 + (shift or 0.0)), rel=1e-6, abs=1e-6 * scale * fmt.max)
    assert torch.equal(quantizer(clip), clip)
    beyond = clip + abs(scale) * fmt.max * torch.tensor([0.1, 5.0, float("inf")])
    assert torch.equal(quantizer(beyond), clip.expand(3))
    low = quantizer.decode(fmt.encode(torch.tensor(fmt.min)))
    assert torch.equal(quantizer(low), low)
    assert torch.equal(quantizer(torch.tensor(float("-inf"))), low)


@given(st.sampled_from(FORMATS), real_scales, st.sampled_from([None, -1.0, 0.3]), seeds)
def test_quantizing_twice_changes_nothing(fmt: Format, scale: float, shift: float | None, seed: int) -> None:
    s = torch.tensor(scale)
    quantizer = Quantizer(fmt, s, None if shift is None else s * fmt.max * shift)
    once = quantizer(wide(fmt, s, torch.zeros(()), 200, seed))
    assert torch.equal(quantizer(once), once)


@given(st.sampled_from(FORMATS), seeds)
def test_decode_of_encode_has_the_bits_of_the_quantized_tensor(fmt: Format, seed: int) -> None:
    scale = random(3, 1, seed=seed).abs() + 1e-3
    offset = random(3, 1, seed=seed + 1)
    for quantizer in (Quantizer(fmt, scale), Quantizer(fmt, scale, offset)):
        x = random(3, 50, seed=seed + 2) * fmt.max * scale
        codes = quantizer.encode(x)
        assert codes.dtype == torch.uint8
        assert codes.shape == x.shape
        assert torch.equal(quantizer.decode(codes).view(torch.int32), quantizer(x).view(torch.int32))


def test_a_row_has_its_own_scale_and_offset() -> None:
    fmt = parse_format("ue3m1")
    x = random(4, 64) * torch.tensor([[1e-3], [1.0], [30.0], [1.0]])
    scale, offset = x.abs().amax(1, keepdim=True) / 5, x.amin(1, keepdim=True)
    together = Quantizer(fmt, scale, offset)(x)
    for i in range(4):
        assert torch.equal(together[i], Quantizer(fmt, scale[i], offset[i])(x[i]))


def test_integers_with_an_offset_are_asymmetric_quantization() -> None:
    x = torch.tensor([-0.3, -0.2785, 0.0, 0.1, 1.1, 3.0])
    scale, zero_point = 0.1, 3
    expected = ((x.double() / scale).round() + zero_point).clamp(0, 15) - zero_point
    result = Quantizer(parse_format("uint4"), torch.tensor(scale), torch.tensor(-scale * zero_point))(x)
    assert torch.allclose(result.double(), expected * scale, atol=1e-7, rtol=0)
    assert result[2] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type_and_is_quantized_in_float32(dtype: torch.dtype) -> None:
    x = random(64).to(dtype)
    for quantizer in (Quantizer(parse_format("e4m3"), torch.tensor(0.0123)), Quantizer(parse_format("e2m1"), None)):
        result = quantizer(x)
        assert result.dtype == dtype
        assert torch.equal(result, quantizer(x.float()).to(dtype))


def test_nan_is_refused_by_encode_and_shown_by_forward() -> None:
    quantizer = Quantizer(parse_format("e2m1"), torch.tensor(0.1))
    x = torch.tensor([0.1, float("nan")])
    assert quantizer(x).isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match="NaN"):
        quantizer.encode(x)


def test_infinity_saturates() -> None:
    quantizer = Quantizer(parse_format("e2m1"), torch.tensor(0.1))
    assert torch.equal(
        quantizer(torch.tensor([float("inf"), -float("inf")])), torch.stack([quantizer.clip, -quantizer.clip])
    )


# --- dynamic scales ------------------------------------------------------------------------------------------------


@given(st.sampled_from([f for f in FORMATS if f.signed]), seeds)
def test_dynamic_scale_is_that_of_each_tokens_largest_magnitude(fmt: Format, seed: int) -> None:
    x = random(2, 3, 16, seed=seed) * 10 ** random(2, 3, 1, seed=seed + 1)
    result = Quantizer(fmt, None)(x)
    for i in range(2):
        for j in range(3):
            static = Quantizer(fmt, x[i, j].abs().max() / fmt.max)
            assert torch.equal(result[i, j], static(x[i, j]))


def test_dynamic_scale_is_shared_by_the_dimensions_of_a_token() -> None:
    fmt = parse_format("e4m3")
    x = random(3, 4, 5, 5) * torch.tensor([1.0, 100.0, 1e-4])[:, None, None, None]
    result = Quantizer(fmt, None, token_dims=(1, 2, 3))(x)
    for i in range(3):
        assert torch.equal(result[i], Quantizer(fmt, x[i].abs().max() / fmt.max)(x[i]))


@pytest.mark.parametrize("name", ["e4m3", "e2m1", "e3m0", "int8"])
def test_dynamic_quantization_of_a_zero_token_is_zero(name: str) -> None:
    x = torch.stack([torch.zeros(8), torch.ones(8)])
    result = Quantizer(parse_format(name), None)(x)
    assert torch.equal(result[0], x[0])
    assert torch.equal(result[1], x[1])


def test_dynamic_quantizer_has_no_scale_clip_or_decoding() -> None:
    quantizer = Quantizer(parse_format("e4m3"), None)
    with pytest.raises(ValueError, match="dynamic"):
        _ = quantizer.clip
    with pytest.raises(ValueError, match="dynamic"):
        quantizer.current_scale()
    with pytest.raises(ValueError, match="dynamic"):
        quantizer.decode(torch.zeros(3, dtype=torch.uint8))
    quantizer.learn_scale()
    assert list(quantizer.parameters()) == []


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shift", [None, 0.4])
def test_gradient_of_the_input_is_one_inside_the_range_and_zero_outside(fmt: Format, shift: float | None) -> None:
    scale = torch.tensor(0.0137)
    offset = None if shift is None else scale * fmt.max * shift
    base = 0.0 if offset is None else offset.item()
    low, high = scale.item() * fmt.min + base, scale.item() * fmt.max + base
    x = torch.linspace(low - 1e-2 * high, high * 1.01, 301)
    x = torch.cat([x, torch.tensor([-float("inf"), float("inf"), 1e30])]).requires_grad_()
    inside = (x > low) & (x < high)
    weights = torch.arange(len(x)) + 1.0
    (Quantizer(fmt, scale, offset)(x) * weights).sum().backward()
    assert torch.allclose(x.grad[inside], weights[inside], rtol=1e-6, atol=0)
    assert not x.grad[~inside].any()
    assert min(int(inside.sum()), int((~inside).sum())) > 3


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shift", [None, -0.2])
def test_gradient_of_a_learned_scale_is_that_of_lsq(fmt: Format, shift: float | None) -> None:
    """d Q / d scale is value - x / scale inside the range and the bound outside; the parameter is log of a factor."""
    scale = torch.tensor([[0.02], [0.3]])
    offset = None if shift is None else scale * fmt.max * shift
    x = random(2, 400) * scale * fmt.max
    grad_out = random(2, 400, seed=5)
    quantizer = Quantizer(fmt, scale, offset)
    quantizer.learn_scale()
    quantizer(x).backward(grad_out)

    y = (x.double() - (0 if offset is None else offset.double())) / scale.double()
    value = (quantizer(x).detach().double() - (0 if offset is None else offset.double())) / scale.double()
    inside = (y >= fmt.min) & (y <= fmt.max)
    assert 0 < inside.sum() < inside.numel()
    per_element = torch.where(inside, value - y, y.clamp(fmt.min, fmt.max))
    expected = (per_element * grad_out * scale).sum(1, keepdim=True)
    assert torch.allclose(quantizer.log_gain.grad.double(), expected, rtol=1e-3, atol=1e-3 * scale.max().item())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_value_does_not_depend_on_whether_gradients_are_taken(fmt: Format) -> None:
    quantizer = Quantizer(fmt, torch.tensor(0.0137), torch.tensor(-0.1))
    x = torch.cat([random(500) * 0.0137 * fmt.max, random(500) * 0.0137])
    with torch.no_grad():
        expected = quantizer(x)
    assert torch.equal(quantizer(x.requires_grad_()).detach(), expected)


def test_no_gradient_reaches_a_dynamic_scale() -> None:
    x = random(3, 8).requires_grad_()
    Quantizer(parse_format("e4m3"), None)(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


# --- learned scales and state --------------------------------------------------------------------------------------


def test_learning_starts_at_the_scale_and_freezing_keeps_what_was_learned() -> None:
    quantizer = Quantizer(parse_format("e2m1"), torch.tensor([[0.1], [0.2]]))
    x = random(2, 32)
    before = quantizer(x)
    quantizer.learn_scale()
    assert torch.equal(quantizer(x).detach(), before)
    assert [p.shape for p in quantizer.parameters()] == [(2, 1)]
    with torch.no_grad():
        quantizer.log_gain.copy_(torch.tensor([[math.log(2.0)], [0.0]]))
    learned = quantizer(x).detach()
    assert torch.allclose(learned[0], Quantizer(quantizer.format, torch.tensor(0.2))(x[0]))
    assert torch.equal(learned[1], before[1])
    quantizer.freeze_scale()
    assert list(quantizer.parameters()) == []
    assert torch.equal(quantizer(x), learned)


@pytest.mark.parametrize("offset", [None, torch.tensor([[-0.5], [0.25]])])
@pytest.mark.parametrize("learned", [False, True])
def test_state_reads_back_to_the_same_quantizer(offset: Tensor | None, learned: bool) -> None:
    quantizer = Quantizer(parse_format("ue4m4"), torch.tensor([[0.01], [0.02]]), offset)
    if learned:
        quantizer.learn_scale()
        with torch.no_grad():
            quantizer.log_gain.add_(0.3)
    again = Quantizer.from_state(quantizer.to_state())
    x = random(2, 64)
    assert again.format == quantizer.format
    assert torch.equal(again(x), quantizer(x).detach())
    assert torch.equal(
        again.clip, quantizer.current_scale().detach() * quantizer.format.max + (0 if offset is None else offset)
    )


def test_state_of_a_dynamic_quantizer_keeps_its_token() -> None:
    quantizer = Quantizer(parse_format("float8_e4m3fn"), None, token_dims=(1, 2))
    again = Quantizer.from_state(quantizer.to_state())
    x = random(3, 4, 5)
    assert torch.equal(again(x), quantizer(x))
    assert not torch.equal(again(x), Quantizer(quantizer.format, None)(x))


def test_scale_and_offset_move_with_the_module_and_stay_float32() -> None:
    quantizer = Quantizer(IntFormat(4), torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float16))
    assert {name: t.dtype for name, t in quantizer.state_dict().items()} == {
        "scale": torch.float32,
        "offset": torch.float32,
    }
