"""Learned rounding against the grid itself, finite differences and the formulas of AdaRound in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fpq_lightning.formats.numbers import Format, parse_format
from fpq_lightning.kernels.reference import rounding_regulariser
from fpq_lightning.quantization.quantizer import Quantizer
from fpq_lightning.quantization.rounding import LearnedRounding, beta_schedule

NAMES = ["e2m1", "e1m2", "e3m0", "e4m3", "e2m5", "ue2m2", "int4", "int8", "uint4", "float8_e4m3fn", "float4_e2m1fn"]
FORMATS = [parse_format(name) for name in NAMES]
seeds = st.integers(0, 2**31 - 1)
both = pytest.mark.parametrize("scale_aware", [False, True])
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def make_problem(fmt: Format, seed: int = 0, n: int = 64, clip: float = 0.8) -> tuple[Quantizer, Tensor]:
    """Two rows of very different size, some of whose weights are beyond the clip, one of them zero."""
    rows = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)) * torch.tensor([[0.013], [2.7]])
    rows[:, 0] = 0
    top = rows.abs().amax(1, keepdim=True) * clip
    if fmt.signed:
        return Quantizer(fmt, top / fmt.max), rows
    return Quantizer(fmt, 2 * top / fmt.max, -top), rows


def unit(quantizer: Quantizer, rows: Tensor) -> Tensor:
    """The rows at the unit scale of the format, clamped to its range, as the quantizer has them (float32)."""
    shifted = rows if quantizer.offset is None else rows - quantizer.offset
    return (shifted / quantizer.scale).clamp(quantizer.format.min, quantizer.format.max)


def neighbours(fmt: Format, y: Tensor) -> tuple[Tensor, Tensor]:
    """The grid value of the next smaller magnitude (or the element's own), and the next larger one, if there is one."""
    below = torch.searchsorted(fmt.grid, y, right=True) - 1
    above = torch.searchsorted(fmt.grid, y)
    inner = torch.where(y < 0, fmt.grid[above.clamp(max=len(fmt.grid) - 1)], fmt.grid[below])
    outer = torch.where(y < 0, fmt.grid[(above - 1).clamp(min=0)], fmt.grid[(below + 1).clamp(max=len(fmt.grid) - 1)])
    return inner, outer


def set_decisions(rounding: LearnedRounding, up: Tensor | bool, size: float = 50.0) -> None:
    with torch.no_grad():
        rounding.v.copy_(torch.where(torch.as_tensor(up), size, -size).expand_as(rounding.v))


# --- where learning starts -----------------------------------------------------------------------------------------


@every_format
@both
def test_learning_starts_at_the_full_precision_weight(fmt: Format, scale_aware: bool) -> None:
    quantizer, rows = make_problem(fmt)
    rounding = LearnedRounding(quantizer, rows, scale_aware)
    y = unit(quantizer, rows).double()
    inner, _ = neighbours(fmt, y.float())
    step = fmt.step(y.float()).double()
    # h is the fraction of the step; at 0 and 1 a guard of a hundredth keeps it off the clamp.
    fraction = ((y - inner.double()).abs() / step).clamp(0, 1)
    tolerance = torch.where((fraction < 0.011) | (fraction > 0.989), 0.0101, 1e-4)
    assert ((rounding.h().double() - fraction).abs() <= tolerance).all()
    offset = 0.0 if quantizer.offset is None else quantizer.offset.double()
    reached = (rounding().detach().double() - offset) / quantizer.scale.double()
    inside = (y < fmt.max) & ((y > fmt.min) | (fmt.min == 0))  # the ends cannot be exceeded, so no guard there
    assert ((reached - y).abs() <= tolerance * step)[inside].all()
    assert ((reached - y).abs() <= 1e-6 * fmt.max)[~inside].all()
    assert (y == fmt.max).any()


@every_format
@both
def test_hard_decision_before_learning_is_nearest_rounding(fmt: Format, scale_aware: bool) -> None:
    """Ties (frac exactly one half) excepted, which V = 0 rounds up."""
    quantizer, rows = make_problem(fmt)
    rounding = LearnedRounding(quantizer, rows, scale_aware)
    assert torch.equal(quantizer.decode(rounding.codes()), quantizer(rows))


def test_gradient_is_alive_at_the_start_everywhere() -> None:
    for fmt in FORMATS:
        quantizer, rows = make_problem(fmt)
        y = unit(quantizer, rows)
        inside = (y > fmt.min) & (y < fmt.max)
        rounding = LearnedRounding(quantizer, rows)
        rounding().sum().backward()
        assert ((rounding.v.grad * torch.where(y < 0, -1, 1))[inside] > 0).all()


# --- hard decisions ------------------------------------------------------------------------------------------------


@every_format
@both
def test_down_and_up_are_the_grid_neighbours(fmt: Format, scale_aware: bool) -> None:
    quantizer, rows = make_problem(fmt)
    rounding = LearnedRounding(quantizer, rows, scale_aware)
    low, high = neighbours(fmt, unit(quantizer, rows))
    for up, expected in ((False, low), (True, high)):
        set_decisions(rounding, up)
        decoded = fmt.decode(rounding.codes())
        wrong = decoded != expected
        assert not wrong.any(), (unit(quantizer, rows)[wrong][:4], decoded[wrong][:4], expected[wrong][:4])


@given(st.sampled_from(FORMATS), st.booleans(), seeds)
def test_down_and_up_bracket_the_weight_on_the_grid(fmt: Format, scale_aware: bool, seed: int) -> None:
    quantizer, rows = make_problem(fmt, seed, clip=1.1)
    rounding = LearnedRounding(quantizer, rows, scale_aware)
    y = unit(quantizer, rows)
    low, high = neighbours(fmt, y)
    decided = torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.5
    set_decisions(rounding, decided)
    assert torch.equal(fmt.decode(rounding.codes()), torch.where(decided, high, low))


@pytest.mark.parametrize("name", ["e2m1", "e3m2", "e4m3", "e1m2", "e3m0"])
def test_neighbours_are_right_on_both_sides_of_a_power_of_two(name: str) -> None:
    """Just below a power of two the upper neighbour is the power, above it the step doubles, of either sign."""
    fmt = parse_format(name)
    powers = fmt.grid[(fmt.grid > 0) & (fmt.grid.log2() % 1 == 0)]
    zero, infinity = torch.tensor(0.0), torch.tensor(float("inf"))
    y = torch.cat([powers.nextafter(zero), powers.nextafter(infinity)]).clamp(max=fmt.max)
    y = torch.cat([y, -y])[None]
    rounding = LearnedRounding(Quantizer(fmt, torch.ones(1, 1)), y)
    low, high = neighbours(fmt, y)
    set_decisions(rounding, False)
    assert torch.equal(fmt.decode(rounding.codes()), low)
    set_decisions(rounding, True)
    assert torch.equal(fmt.decode(rounding.codes()), high)


@every_format
def test_a_weight_at_or_below_the_lower_clip_stays_there(fmt: Format) -> None:
    rounding = LearnedRounding(Quantizer(fmt, torch.ones(1, 1)), torch.tensor([[fmt.min, fmt.min * 1.5]]))
    for up in (False, True) if fmt.min < 0 else (False,):
        set_decisions(rounding, up)
        assert fmt.decode(rounding.codes()).tolist() == [[fmt.min] * 2]


@every_format
def test_a_weight_at_the_upper_clip_stays_there(fmt: Format) -> None:
    quantizer = Quantizer(fmt, torch.full((1, 1), 0.37))
    rounding = LearnedRounding(quantizer, 0.37 * fmt.max * torch.tensor([[1.001, 1.1, 9.0]]))
    for up in (False, True):
        set_decisions(rounding, up)
        assert fmt.decode(rounding.codes()).tolist() == [[fmt.max] * 3]
        assert torch.equal(rounding().detach(), quantizer.clip.expand(1, 3))


@every_format
@both
def test_hard_forward_has_the_bits_of_the_decoded_codes(fmt: Format, scale_aware: bool) -> None:
    quantizer, rows = make_problem(fmt)
    rounding = LearnedRounding(quantizer, rows, scale_aware)
    rounding.hardness = 1.0
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    for size in (0.0, 0.3, 3.0, 50.0):
        with torch.no_grad():
            rounding.v.add_(size * noise)
        weight = rounding().detach()
        codes = rounding.codes()
        assert codes.dtype == torch.uint8
        assert codes.shape == rows.shape
        assert torch.equal(weight, quantizer.decode(codes))
        assert torch.equal(quantizer(weight), weight)


@every_format
@both
def test_soft_rounding_reaches_the_codes_once_every_h_is_decided(fmt: Format, scale_aware: bool) -> None:
    quantizer, rows = make_problem(fmt)
    rounding = LearnedRounding(quantizer, rows, scale_aware)
    set_decisions(rounding, torch.arange(rows.numel()).reshape(rows.shape) % 2 == 0)
    assert torch.equal(rounding().detach(), quantizer.decode(rounding.codes()))
    assert set(rounding.h().unique().tolist()) == {0.0, 1.0}


@both
def test_decision_falls_at_h_of_one_half(scale_aware: bool) -> None:
    quantizer, rows = make_problem(parse_format("e2m1"))
    rounding = LearnedRounding(quantizer, rows, scale_aware)
    low, high = neighbours(quantizer.format, unit(quantizer, rows))
    with torch.no_grad():
        rounding.v.uniform_(-3, 3, generator=torch.Generator().manual_seed(0))
        rounding.v[:, ::4] = 0  # undecided goes away from zero
    h = rounding.h().detach().where(rounding.v != 0, 0.5)
    assert torch.equal(quantizer.format.decode(rounding.codes()), torch.where(h >= 0.5, high, low))


# --- h and its gradient --------------------------------------------------------------------------------------------


@both
def test_h_is_the_rectified_sigmoid(scale_aware: bool) -> None:
    quantizer, rows = make_problem(parse_format("e2m1"))
    rounding = LearnedRounding(quantizer, rows, scale_aware)
    with torch.no_grad():
        rounding.v.uniform_(-4, 4, generator=torch.Generator().manual_seed(0))
    v = rounding.v.detach().double()
    if scale_aware:  # V / step, steps relative to the largest of the row
        step = quantizer.format.step(unit(quantizer, rows)).double()
        v = v * step.amax(1, keepdim=True) / step
    expected = (1.2 / (1 + torch.exp(-v)) - 0.1).clamp(0, 1)
    assert torch.allclose(rounding.h().detach().double(), expected, atol=1e-6)
    assert {0.0, 1.0} < set(expected.unique().tolist())


@every_format
@both
def test_gradient_of_v_is_that_of_finite_differences(fmt: Format, scale_aware: bool) -> None:
    quantizer, rows = make_problem(fmt, n=24)
    rounding = LearnedRounding(quantizer, rows, scale_aware).double()
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(3)).double()
    (rounding() * weights).sum().backward()
    epsilon = 1e-6
    numeric = torch.zeros_like(weights)
    with torch.no_grad():
        v = rounding.v.clone()
        for sign in (1, -1):
            # Every weight depends on its own V alone.
            rounding.v.copy_(v + sign * epsilon)
            numeric += sign * rounding() * weights / (2 * epsilon)
    assert numeric.abs().max() > 0
    assert torch.allclose(rounding.v.grad, numeric, rtol=1e-4, atol=1e-8 * float(numeric.abs().max()))


def test_scale_aware_gradient_of_a_row_does_not_depend_on_the_step() -> None:
    """All weights are the same fraction of their steps 1, 2, 4 and 8 up; the second row has no larger step than 2."""
    fmt = parse_format("e3m0")
    rows = torch.tensor([[1.3, 2.6, 5.2, 10.4], [2.6, 1.3, 1.3, 2.6]])
    quantizer = Quantizer(fmt, torch.ones(1, 1))
    gradients = {}
    for scale_aware in (False, True):
        rounding = LearnedRounding(quantizer, rows, scale_aware)
        rounding().sum().backward()
        gradients[scale_aware] = rounding.v.grad / rounding.v.grad[0, 0]
    assert torch.allclose(gradients[False], torch.tensor([[1.0, 2.0, 4.0, 8.0], [2.0, 1.0, 1.0, 2.0]]))
    assert torch.allclose(gradients[True], torch.tensor([[1.0] * 4, [0.25] * 4]))


@both
def test_scale_awareness_changes_neither_the_start_nor_integers(scale_aware: bool) -> None:
    for fmt in FORMATS:
        quantizer, rows = make_problem(fmt)
        plain, aware = (LearnedRounding(quantizer, rows, a) for a in (False, scale_aware))
        assert torch.allclose(plain.h(), aware.h(), atol=1e-5)
        if fmt.name.startswith(("int", "uint")):
            assert torch.equal(plain.v, aware.v)


@every_format
@both
def test_straight_through_gradient_is_that_of_soft_rounding(fmt: Format, scale_aware: bool) -> None:
    """Where neither the soft nor the hard value is clamped at the ends of the range."""
    quantizer, rows = make_problem(fmt)
    gradients = []
    for hardness in (0.0, 1.0, torch.tensor(1.0)):
        rounding = LearnedRounding(quantizer, rows, scale_aware)
        rounding.hardness = hardness
        rounding().sum().backward()
        gradients.append(rounding.v.grad)
    inside = unit(quantizer, rows).abs() < fmt.max * 0.6
    assert inside.any()
    assert torch.equal(gradients[0][inside], gradients[1][inside])
    assert torch.equal(gradients[1], gradients[2])


@every_format
def test_learned_scale_moves_the_grid_and_not_the_codes(fmt: Format) -> None:
    quantizer, rows = make_problem(fmt)
    quantizer.learn_scale()
    rounding = LearnedRounding(quantizer, rows)
    rounding.hardness = 1.0
    codes = rounding.codes()
    weight = rounding()
    weight.sum().backward()
    values = fmt.decode(codes)
    expected = (values * quantizer.scale).sum(1, keepdim=True)  # d/d log_gain of sum(scale * exp(log_gain) * value)
    assert torch.allclose(quantizer.log_gain.grad, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        quantizer.log_gain.fill_(math.log(1.5))
    assert torch.equal(rounding.codes(), codes)
    quantizer.freeze_scale()
    assert torch.equal(rounding().detach(), quantizer.decode(codes))


def test_rounding_can_be_learned_towards_a_target() -> None:
    """Adam on V alone finds the roundings that make the best sum, which nearest rounding does not."""
    fmt = parse_format("e2m1")
    rows = torch.full((1, 8), 1.2)  # between 1 and 1.5; nearest is 1
    rounding = LearnedRounding(Quantizer(fmt, torch.ones(1, 1)), rows + torch.linspace(0, 0.01, 8))
    optimiser = torch.optim.Adam([rounding.v], lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        loss = (rounding().sum() - 9.5).square() + 0.1 * rounding_regulariser(rounding.h(), 2.0)
        loss.backward()
        optimiser.step()
    assert fmt.decode(rounding.codes()).sum() == 9.5
    assert LearnedRounding(Quantizer(fmt, torch.ones(1, 1)), rows)().sum() != 9.5


# --- regulariser and schedule --------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(1.5, 20))
def test_regulariser_is_the_formula_of_adaround(values: list[float], beta: float) -> None:
    h = torch.tensor(values)
    expected = sum(1 - abs(2 * v - 1) ** beta for v in values) / len(values)
    assert rounding_regulariser(h, beta).item() == pytest.approx(expected, abs=1e-5)
    assert rounding_regulariser(h, torch.tensor(beta)).item() == pytest.approx(expected, abs=1e-5)


def test_regulariser_is_zero_once_all_is_decided_and_largest_at_one_half() -> None:
    for beta in (20.0, 8.0, 2.0):
        assert rounding_regulariser(torch.tensor([0.0, 1.0, 1.0, 0.0]), beta) == 0
        assert rounding_regulariser(torch.full((3,), 0.5), beta) == 1
        h = torch.linspace(0.5, 1, 20)
        values = torch.stack([rounding_regulariser(x, beta) for x in h])
        assert (values.diff() <= 0).all()
        assert torch.allclose(values, torch.stack([rounding_regulariser(1 - x, beta) for x in h]), atol=1e-6)


def test_regulariser_pushes_h_to_the_nearer_end_with_a_finite_gradient() -> None:
    h = torch.tensor([0.0, 0.1, 0.4, 0.5, 0.6, 0.9, 1.0], requires_grad=True)
    rounding_regulariser(h, torch.tensor(2.0)).backward()
    assert torch.equal(h.grad.sign(), torch.tensor([1.0, 1, 1, 0, -1, -1, -1]))


def test_beta_falls_from_start_to_end_along_a_cosine_after_the_warm_up() -> None:
    assert beta_schedule(0.0, 0.2) is None
    assert beta_schedule(0.1999, 0.2) is None
    assert beta_schedule(0.2, 0.2) == pytest.approx(20.0)
    assert beta_schedule(1.0, 0.2) == pytest.approx(2.0)
    assert beta_schedule(0.6, 0.2) == pytest.approx(11.0)
    assert beta_schedule(0.4, 0.2, start=10, end=4) == pytest.approx(7 + 3 * math.cos(math.pi / 4))
    assert beta_schedule(0.0, 0.0) == pytest.approx(20.0)


@given(st.floats(0, 0.99), st.floats(2, 30), st.floats(1, 2))
def test_beta_never_rises(warmup: float, start: float, end: float) -> None:
    betas = [beta_schedule(i / 50, warmup, start, end) for i in range(51)]
    known = [b for b in betas if b is not None]
    assert betas == [None] * (51 - len(known)) + known
    assert all(a >= b for a, b in pairwise(known))
    assert known[-1] == pytest.approx(end)
    assert max(known) <= start + 1e-9
