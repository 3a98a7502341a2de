"""Formats against the types of torch and ml_dtypes, the textbook formula and brute force over the grid."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fpq_lightning.formats.numbers import (
    FAMILIES,
    FORMATS,
    FloatFormat,
    Format,
    IntFormat,
    parse_format,
    parse_formats,
)

FREE = [
    FloatFormat(exponent, bits - exponent - signed, signed=signed)
    for signed in (True, False)
    for bits in range(2, 9)
    for exponent in range(1, bits - signed + 1)
    if (exponent, signed) != (8, False)  # its largest value, 2^128, is no float32
]
INTEGERS = [IntFormat(width, signed) for width in range(2, 9) for signed in (True, False)]
HARDWARE = list(FORMATS)
ALL = [*FREE, *INTEGERS, *HARDWARE]

# Implementations that are not ours; ml_dtypes has the types that torch lacks.
TORCH_TYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
REFERENCE_MAX = {
    "float8_e4m3fn": 448.0,
    "float8_e5m2": 57344.0,
    "float6_e2m3fn": 7.5,
    "float6_e3m2fn": 28.0,
    "float4_e2m1fn": 6.0,
}


def reference_encode(name: str, x: Tensor) -> Tensor:
    if name in TORCH_TYPES:
        return x.to(TORCH_TYPES[name]).view(torch.uint8)
    return torch.from_numpy(x.numpy().astype(getattr(ml_dtypes, name)).view(np.uint8))


def reference_decode(name: str, codes: Tensor) -> Tensor:
    if name in TORCH_TYPES:
        return codes.view(TORCH_TYPES[name]).float()
    return torch.from_numpy(codes.numpy().view(getattr(ml_dtypes, name)).astype(np.float32))


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype == torch.float32
    different = actual.view(torch.int32) != expected.view(torch.int32)
    assert not different.any(), (actual[different][:5], expected[different][:5], int(different.sum()))


def textbook_magnitudes(fmt: FloatFormat) -> list[Fraction]:
    """Non-negative values of E exponent and M mantissa bits with the IEEE bias, exactly, ascending."""
    e, m = fmt.exponent, fmt.mantissa
    bias = 2 ** (e - 1) - 1
    values = []
    for field in range(2**e):
        for fraction in range(2**m):
            if field == 0:
                values.append(Fraction(fraction, 2**m) * Fraction(2) ** (1 - bias))
            else:
                values.append((1 + Fraction(fraction, 2**m)) * Fraction(2) ** (field - bias))
    return values[: len(values) - fmt.reserved]


def signed_values(fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """All values of a format ascending (float64) and whether the code of each is even."""
    if isinstance(fmt, IntFormat):
        low, high = (-(2 ** (fmt.width - 1)), 2 ** (fmt.width - 1)) if fmt.signed else (0, 2**fmt.width)
        values = np.arange(low, high, dtype=np.float64)
        return values, values % 2 == 0
    magnitudes = np.array([float(v) for v in textbook_magnitudes(fmt)])
    even = np.arange(len(magnitudes)) % 2 == 0
    if not fmt.signed:
        return magnitudes, even
    return np.concatenate([-magnitudes[:0:-1], magnitudes]), np.concatenate([even[:0:-1], even])


def brute_force(fmt: Format, x: Tensor) -> Tensor:
    """The nearest value of each element in float64, ties to the even code, by looking at all of them."""
    values, even = signed_values(fmt)
    distance = np.abs(x.double().clamp(values[0], values[-1]).numpy()[:, None] - values)
    nearest = distance == distance.min(axis=1, keepdims=True)
    # Among equally near values the even one wins; there are at most two, and neighbours differ in parity.
    return torch.from_numpy(values[np.argmax(nearest * (1 + even), axis=1)]).float()


def awkward_inputs(fmt: Format, n: int = 500) -> Tensor:
    """Grid values, midpoints, their float32 neighbours, and random values of all magnitudes."""
    values = torch.from_numpy(signed_values(fmt)[0])
    exact = torch.cat([values, (values[1:] + values[:-1]) / 2]).float()
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(n, generator=generator) * torch.exp2(
        torch.empty(n).uniform_(float(np.log2(fmt.smallest_step)) - 3, float(np.log2(fmt.max)) + 2, generator=generator)
    )
    up, down = torch.tensor(float("inf")), torch.tensor(float("-inf"))
    return torch.cat([exact, exact.nextafter(up), exact.nextafter(down), spread, torch.tensor([0.0, -0.0, 1e-45])])


def random_in_range(maximum: float, n: int = 1_000_000) -> Tensor:
    """Finite float32 up to `maximum` in magnitude: any bit pattern, uniform, and all magnitudes near the format's."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randint(-(2**31), 2**31, (n,), generator=generator).int().view(torch.float32)
    patterns = patterns[patterns.isfinite() & (patterns.abs() <= maximum)][: n // 4]
    uniform = torch.empty(n // 2).uniform_(-maximum, maximum, generator=generator)
    magnitudes = torch.exp2(
        torch.empty(n - n // 2 - len(patterns)).uniform_(-24, np.log2(maximum), generator=generator)
    )
    signs = torch.randint(0, 2, magnitudes.shape, generator=generator) * 2 - 1
    x = torch.cat([patterns, uniform, magnitudes * signs])
    assert len(x) == n
    return x.clamp(-maximum, maximum)


# --- hardware types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFERENCE_MAX)
def test_every_hardware_code_decodes_to_the_bits_of_the_reference(name: str) -> None:
    fmt = FORMATS[name]
    codes = torch.arange(2**fmt.bits, dtype=torch.int32).to(torch.uint8)
    expected = reference_decode(name, codes)
    actual = fmt.decode(codes)
    finite = expected.isfinite()
    assert_same_bits(actual[finite], expected[finite])
    assert actual[~finite].isnan().all()
    assert int((~finite).sum()) == {"float8_e4m3fn": 2, "float8_e5m2": 8}.get(name, 0)


@pytest.mark.parametrize("name", REFERENCE_MAX)
def test_quantize_and_encode_hit_the_bits_of_the_reference_on_a_million_inputs(name: str) -> None:
    fmt = FORMATS[name]
    assert fmt.max == REFERENCE_MAX[name]
    maximum = REFERENCE_MAX[name]
    x = torch.cat([random_in_range(maximum), awkward_inputs(fmt).clamp(-maximum, maximum)])
    codes = reference_encode(name, x)
    assert_same_bits(fmt.quantize(x), reference_decode(name, codes))
    assert torch.equal(fmt.encode(x), codes)


@pytest.mark.parametrize("name", REFERENCE_MAX)
def test_hardware_overflow_saturates_where_the_reference_has_nan_or_inf(name: str) -> None:
    fmt, maximum = FORMATS[name], REFERENCE_MAX[name]
    x = torch.tensor([maximum * 1.0001, maximum * 1.03, maximum * 1.5, 3.4e38, float("inf")])
    x = torch.cat([x, -x])
    expected = reference_encode(name, x.clamp(-maximum, maximum))
    assert torch.equal(fmt.encode(x), expected)
    assert_same_bits(fmt.quantize(x), reference_decode(name, expected))


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [*FREE, *HARDWARE], ids=str)
def test_float_grid_is_the_textbook_one(fmt: FloatFormat) -> None:
    magnitudes = textbook_magnitudes(fmt)
    assert Fraction(fmt.max) == magnitudes[-1]
    assert Fraction(fmt.min) == (-magnitudes[-1] if fmt.signed else 0)
    assert Fraction(fmt.smallest_step) == magnitudes[1]
    expected = signed_values(fmt)[0]
    assert np.array_equal(fmt.grid.double().numpy(), expected)
    assert fmt.grid.dtype == torch.float32
    codes_per_sign = 2 ** (fmt.bits - fmt.signed) - fmt.reserved
    assert len(expected) == (2 * codes_per_sign - 1 if fmt.signed else codes_per_sign)


@pytest.mark.parametrize("fmt", [f for f in FREE if f.reserved == 0], ids=str)
def test_float_values_satisfy_the_formula_of_kuzmin(fmt: FloatFormat) -> None:
    """s = 2^(p - M - b), p = max(floor(log2|x| + b), 1), b = 2^E - log2 c + log2(2 - 2^-M) - 1, in exact arithmetic."""
    e, m = fmt.exponent, fmt.mantissa
    c = Fraction(fmt.max)
    two_to_b = Fraction(2) ** (2**e - 1) / c * (2 - Fraction(1, 2**m))

    def step(x: Fraction) -> Fraction:
        ratio, p = abs(x) * two_to_b, 0  # floor(log2(ratio))
        while ratio >= 2:
            ratio, p = ratio / 2, p + 1
        return Fraction(2) ** (max(p, 1) - m) / two_to_b

    inputs = awkward_inputs(fmt, n=60).clamp(fmt.min, fmt.max)
    inputs = inputs[:: max(1, len(inputs) // 300)]
    steps = fmt.step(inputs)
    results = fmt.quantize(inputs)
    for x, s, q in zip(inputs.tolist(), steps.tolist(), results.tolist(), strict=True):
        expected_step = step(Fraction(x))
        assert Fraction(s) == expected_step
        multiple = Fraction(q) / expected_step
        assert multiple.denominator == 1
        assert abs(Fraction(x) / expected_step - multiple) <= Fraction(1, 2)


def test_fp4_levels_over_the_clip_are_those_of_the_literature() -> None:
    levels = {
        "e2m1": [0, Fraction(1, 12), Fraction(1, 6), Fraction(1, 4), Fraction(1, 3), Fraction(1, 2), Fraction(2, 3), 1],
        "e1m2": [Fraction(k, 7) for k in range(8)],
        "e3m0": [0, *(Fraction(1, 2**k) for k in range(6, -1, -1))],
    }
    for name, expected in levels.items():
        fmt = parse_format(name)
        positive = [Fraction(v) / Fraction(fmt.max) for v in fmt.grid.tolist() if v >= 0]
        assert positive == expected


def test_integer_grid_is_twos_complement() -> None:
    for fmt in INTEGERS:
        values = signed_values(fmt)[0]
        assert np.array_equal(fmt.grid.double().numpy(), values)
        assert (fmt.min, fmt.max, fmt.smallest_step) == (values[0], values[-1], 1.0)
        if fmt.width == 8:
            codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
            expected = codes.view(torch.int8) if fmt.signed else codes
            assert torch.equal(fmt.decode(codes), expected.float())
            assert torch.equal(fmt.encode(expected.float()), codes)


def test_every_format_that_can_be_named_works_in_float32() -> None:
    x = torch.tensor([0.0, 1e-30, 0.7, 1.0, 3.0, 1e30, 3e38])
    accepted = []
    for name in [f"{sign}e{e}m{m}" for sign in ("", "u") for e in range(10) for m in range(10)]:
        try:
            fmt = parse_format(name)
        except ValueError:
            continue
        accepted.append(fmt)
        assert fmt.grid.isfinite().all(), name
        assert fmt.quantize(x).isfinite().all(), name
        assert torch.equal(fmt.decode(fmt.encode(x)), fmt.quantize(x)), name
    assert set(FREE) <= set(accepted)


@pytest.mark.parametrize("fmt", FREE, ids=str)
def test_step_changes_exactly_at_powers_of_two(fmt: FloatFormat) -> None:
    smallest_normal = fmt.smallest_step * 2**fmt.mantissa
    power = smallest_normal
    while power <= fmt.max:
        here = torch.tensor(power)
        below = here.nextafter(torch.tensor(0.0))
        above = here.nextafter(torch.tensor(float("inf")))
        assert fmt.step(here).item() == fmt.step(above).item() == power / 2**fmt.mantissa
        assert fmt.step(below).item() == max(power / 2, smallest_normal) / 2**fmt.mantissa
        if fmt.signed:
            assert torch.equal(fmt.step(-torch.stack([below, here])), fmt.step(torch.stack([below, here])))
        assert fmt.quantize(torch.stack([below, here, above.clamp(max=fmt.max)])).tolist() == [power] * 3
        power *= 2


# --- rounding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_quantize_gives_the_nearest_value_with_ties_to_the_even_code(fmt: Format) -> None:
    x = awkward_inputs(fmt)
    assert torch.equal(fmt.quantize(x), brute_force(fmt, x))


@given(st.sampled_from(ALL), st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30))
def test_quantize_gives_the_nearest_value_of_any_float32(fmt: Format, values: list[float]) -> None:
    x = torch.tensor(values)
    assert torch.equal(fmt.quantize(x), brute_force(fmt, x))


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_decode_of_encode_has_the_bits_of_quantize(fmt: Format) -> None:
    x = awkward_inputs(fmt)
    codes = fmt.encode(x)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**fmt.bits
    assert_same_bits(fmt.decode(codes), fmt.quantize(x))


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_every_number_code_survives_decode_and_encode(fmt: Format) -> None:
    codes = torch.arange(2**fmt.bits, dtype=torch.int32).to(torch.uint8)
    values = fmt.decode(codes)
    number = values.isfinite()
    assert torch.equal(fmt.encode(values[number]), codes[number])
    assert int((~number).sum()) == (2 * fmt.reserved if isinstance(fmt, FloatFormat) else 0)


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_quantize_is_idempotent(fmt: Format) -> None:
    once = fmt.quantize(awkward_inputs(fmt))
    assert_same_bits(fmt.quantize(once), once)


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_overflow_and_infinities_saturate(fmt: Format) -> None:
    high = torch.tensor([fmt.max * 1.001, fmt.max * 4, 3.4e38, float("inf")])
    assert fmt.quantize(high).tolist() == [fmt.max] * 4
    assert fmt.decode(fmt.encode(high)).tolist() == [fmt.max] * 4
    low = torch.tensor([fmt.min * 1.001, fmt.min * 4 - 1, -3.4e38, float("-inf")])
    assert fmt.quantize(low).tolist() == [fmt.min] * 4
    assert fmt.decode(fmt.encode(low)).tolist() == [fmt.min] * 4


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_nan_stays_nan_in_quantize_and_is_refused_by_encode(fmt: Format) -> None:
    x = torch.tensor([1.0, float("nan"), 0.0])
    assert fmt.quantize(x).isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=f"NaN as {fmt.name}"):
        fmt.encode(x)


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_sign_of_zero_is_kept_where_there_is_a_code_for_it(fmt: Format) -> None:
    zeros = torch.tensor([-0.0, -fmt.smallest_step / 4, 0.0, fmt.smallest_step / 4])
    has_negative_zero = isinstance(fmt, FloatFormat) and fmt.signed
    expected = torch.tensor([-0.0, -0.0, 0.0, 0.0] if has_negative_zero else [0.0] * 4)
    assert_same_bits(fmt.quantize(zeros), expected)
    assert_same_bits(fmt.decode(fmt.encode(zeros)), expected)


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_quantize_leaves_its_argument_and_keeps_any_shape(fmt: Format) -> None:
    x = awkward_inputs(fmt)[:24].reshape(2, 3, 4)
    before = x.clone()
    transposed = x.transpose(0, 2)
    result = fmt.quantize(transposed)
    assert torch.equal(x, before)
    assert torch.equal(result, brute_force(fmt, x.flatten()).reshape(2, 3, 4).transpose(0, 2))
    assert fmt.quantize(torch.tensor(fmt.max)).shape == ()
    assert fmt.quantize(torch.empty(0, 3)).shape == (0, 3)


@given(st.sampled_from(ALL), st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20))
def test_quantize_is_monotone(fmt: Format, values: list[float]) -> None:
    result = fmt.quantize(torch.tensor(sorted(values)))
    assert (result.diff() >= 0).all()


@given(
    st.sampled_from([f for f in ALL if f.signed and isinstance(f, FloatFormat)]),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20),
)
def test_signed_floats_are_odd(fmt: Format, values: list[float]) -> None:
    x = torch.tensor(values)
    assert_same_bits(fmt.quantize(-x), -fmt.quantize(x))


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_name_reads_back(fmt: Format) -> None:
    assert parse_format(fmt.name) == fmt
    assert parse_format(f" {fmt.name.upper()} ") == fmt


def test_names_say_bits_and_sign() -> None:
    assert parse_format("e4m3") == FloatFormat(4, 3)
    assert parse_format("ue4m4") == FloatFormat(4, 4, signed=False)
    assert parse_format("e4m3").bits == parse_format("ue4m4").bits == 8
    assert parse_format("uint4") == IntFormat(4, signed=False)
    assert parse_format("int8") == IntFormat(8)
    assert parse_format("float8_e4m3fn").max == 448
    assert parse_format("e4m3").max == 480


NO_FORMATS = (
    "|fp8|e4|m3|e4m3fn|float8|int|int16|int9|int1|uint1|uint9|e0m3|e5m3|ue5m4|ue0m0|ue1m0|e0m0|-e4m3|e4m3 e5m2|float"
)


@pytest.mark.parametrize("name", NO_FORMATS.split("|"))
def test_names_of_no_format_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="format"):
        parse_format(name)


def test_families_expand_in_order_without_repeats() -> None:
    assert [f.name for f in parse_formats("fp4")] == ["e2m1", "e1m2", "e3m0"]
    assert [f.name for f in parse_formats(["e1m2", "FP4 "])] == ["e1m2", "e2m1", "e3m0"]
    assert parse_formats("int4") == (IntFormat(4),)
    both = [*FAMILIES["fp8"].members, *FAMILIES["ufp8"].members]
    assert [f.name for f in parse_formats(["fp8", "ufp8", "int8"])] == [*both, "int8"]


@pytest.mark.parametrize("family", FAMILIES.names)
def test_formats_of_a_family_have_its_width_and_sign(family: str) -> None:
    formats = parse_formats(family)
    assert {f.bits for f in formats} == {int(family[-1])}
    assert {f.signed for f in formats} == {not family.startswith("u")}
    assert all((f.name in REFERENCE_MAX) == family.startswith("hardware") for f in formats)


def test_formats_of_different_width_are_no_candidates_together() -> None:
    with pytest.raises(ValueError, match="one width"):
        parse_formats(["fp8", "fp4"])
    with pytest.raises(ValueError, match="one width"):
        parse_formats(["e4m3", "int4"])
    with pytest.raises(ValueError, match="one width"):
        parse_formats([])


def test_unknown_names_among_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown format 'fp5'"):
        parse_formats(["fp4", "fp5"])
