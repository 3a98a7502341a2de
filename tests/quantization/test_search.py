"""The search against its definition: quantize with every candidate, in full, and add up float64 errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fpq_lightning.quantization.search as search
from fpq_lightning.formats.numbers import Format, IntFormat, parse_format, parse_formats
from fpq_lightning.quantization.quantizer import Quantizer
from fpq_lightning.quantization.search import SortedRows, search_clip, search_output_error, search_tensor_error

SIGNED = ["e4m3", "e2m5", "e5m2", "e2m1", "e1m2", "e3m0", "int8", "int4", "float8_e4m3fn", "float4_e2m1fn"]
UNSIGNED = ["ue4m4", "ue2m6", "ue2m2", "uint8", "uint4"]
seeds = st.integers(0, 2**31 - 1)

# What weights and activations look like.
DATA = ["gaussian", "heavy", "sparse", "outlier", "one_sided", "constant", "zero", "tiny", "single"]


def make_rows(kind: str, n_rows: int = 3, n: int = 300, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_rows, n, generator=generator)
    if kind == "heavy":
        return x / torch.randn(n_rows, n, generator=generator).abs().sqrt()
    if kind == "sparse":
        return x * (torch.rand(n_rows, n, generator=generator) < 0.05)
    if kind == "outlier":
        return torch.cat([x, 30 * torch.ones(n_rows, 1)], 1)
    if kind == "one_sided":
        return torch.nn.functional.silu(3 * x)
    if kind == "constant":
        return torch.tensor([[0.7], [-1e-3], [123.0]]).expand(3, n).clone()
    if kind == "zero":
        return torch.zeros(n_rows, n)
    if kind == "tiny":
        return x * 1e-7
    if kind == "single":
        return x[:, :1]
    return x


def squared_error(quantizer: Quantizer, rows: Tensor) -> Tensor:
    """Of each row, in float64."""
    return (quantizer(rows).double() - rows.double()).square().sum(1)


def candidate(rows: Tensor, fmt: Format, fraction: float | Tensor) -> Quantizer:
    """Kuzmin's candidate: the clip is a fraction of max|x|, of the whole range for an unsigned format."""
    if fmt.signed:
        return Quantizer(fmt, rows.abs().amax(1, keepdim=True).clamp(min=1e-12) * fraction / fmt.max)
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-12) * fraction / fmt.max
    return Quantizer(fmt, scale, (low * fraction / scale).round() * scale if isinstance(fmt, IntFormat) else low)


def full_search(rows: Tensor, fmt: Format) -> Tensor:
    """The least error of each row over all 111 clips."""
    fractions = torch.tensor([0.1 + 0.01 * i for i in range(111)])[:, None, None]
    errors = candidate(rows, fmt, fractions)(rows[None]).double() - rows.double()
    return errors.square().sum(2).amin(0)


def test_clips_are_those_of_kuzmin() -> None:
    assert torch.allclose(search.CLIPS, torch.tensor([0.1 + 0.01 * i for i in range(111)]), atol=1e-6)


# --- the error of a candidate --------------------------------------------------------------------------------------


def nearest_error(fmt: Format, scale: Tensor, offset: Tensor | None, rows: Tensor) -> Tensor:
    """The sum of squared distances to the nearest of the points `offset + scale * grid`, float64 throughout."""
    points = scale.double() * fmt.grid.double() + (0 if offset is None else offset.double())
    return torch.stack(
        [(r.double()[:, None] - p).abs().amin(1).square().sum() for r, p in zip(rows, points, strict=True)]
    )


def assert_same_error(actual: Tensor, quantizer: Quantizer, rows: Tensor) -> None:
    exact = nearest_error(quantizer.format, quantizer.scale, quantizer.offset, rows)
    size = rows.double().square().sum(1)
    if quantizer.offset is not None:
        size = size + rows.shape[1] * quantizer.offset[:, 0].double().square()
    assert actual.dtype == torch.float64
    # Decision thresholds, and the results of the quantizer itself, are rounded to float32.
    for expected, rounding in ((exact, 1.2e-7), (squared_error(quantizer, rows), 4e-7)):
        slack = rounding * size.sqrt()
        assert ((actual - expected).abs() <= 2 * slack * expected.sqrt() + slack**2).all()


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", [*SIGNED, *UNSIGNED])
def test_squared_error_is_that_of_quantizing_every_value(name: str, kind: str) -> None:
    fmt, rows = parse_format(name), make_rows(kind)
    quantizers = [candidate(rows, fmt, f) for f in (0.13, 0.4, 0.77, 1.0, 1.2)]
    scale = torch.cat([q.scale for q in quantizers], 1)
    offset = None if fmt.signed else torch.cat([q.offset for q in quantizers], 1)
    actual = SortedRows(rows).squared_error(fmt, scale, offset)
    assert actual.shape == (3, 5)
    for errors, quantizer in zip(actual.T, quantizers, strict=True):
        assert_same_error(errors, quantizer, rows)


@given(st.sampled_from([*SIGNED, *UNSIGNED]), st.floats(0.02, 3.0), st.floats(-2.0, 2.0), seeds)
def test_squared_error_of_any_scale_and_offset(name: str, fraction: float, shift: float, seed: int) -> None:
    fmt, rows = parse_format(name), make_rows("heavy", n=100, seed=seed)
    scale = rows.abs().amax(1, keepdim=True) * fraction / fmt.max
    for offset in (None, torch.full_like(scale, shift)):
        actual = SortedRows(rows).squared_error(fmt, scale, offset)[:, 0]
        assert_same_error(actual, Quantizer(fmt, scale, offset), rows)


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many thresholds were looked up at once, for every time."""
    sizes: list[int] = []
    searchsorted = torch.searchsorted

    def counting(values: Tensor, thresholds: Tensor, **options: Any) -> Tensor:
        sizes.append(thresholds.numel())
        return searchsorted(values, thresholds, **options)

    monkeypatch.setattr(torch, "searchsorted", counting)
    return sizes


@pytest.mark.parametrize("name", ["e4m3", "uint4"])
def test_lookups_in_chunks_give_the_same_errors(name: str, monkeypatch: pytest.MonkeyPatch, lookups: list[int]) -> None:
    fmt, rows = parse_format(name), make_rows("gaussian", n_rows=4)
    scales = torch.rand(4, 17, generator=torch.Generator().manual_seed(0)) + 0.01
    offsets = None if fmt.signed else -scales * 3
    whole = SortedRows(rows).squared_error(fmt, scales, offsets)
    assert len(lookups) == 1
    for at_once in (30, 12, 1):  # pairs of a row and a candidate
        lookups.clear()
        monkeypatch.setattr(search, "_CHUNK", at_once * len(fmt.grid))
        assert torch.equal(SortedRows(rows).squared_error(fmt, scales, offsets), whole)
        assert len(lookups) > 1


@pytest.mark.parametrize("name", ["e4m3", "int8", "ue4m4"])
def test_lookups_stay_within_the_chunk_limit(name: str, monkeypatch: pytest.MonkeyPatch, lookups: list[int]) -> None:
    """However many rows (groups of a large weight) and candidates there are."""
    fmt, rows = parse_format(name), make_rows("gaussian", n_rows=4)
    too_large = []
    for candidates in (1, 2, 5, 17, 111):
        for at_once in (1, 2, 4, 8, 13):  # pairs of a row and a candidate
            lookups.clear()
            monkeypatch.setattr(search, "_CHUNK", at_once * len(fmt.grid))
            SortedRows(rows).squared_error(fmt, torch.ones(4, candidates))
            if max(lookups) > at_once * len(fmt.grid):
                too_large.append((candidates, at_once, max(lookups) / len(fmt.grid)))
    assert not too_large, too_large


# --- the clip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SIGNED, *UNSIGNED])
def test_clip_is_within_a_percent_of_the_best_of_all_111(name: str) -> None:
    fmt = parse_format(name)
    worse = {}
    for kind in DATA:
        for seed in range(3):
            rows = make_rows(kind, seed=seed)
            scale, offset, error = search_clip(SortedRows(rows), fmt)
            assert scale.shape == error.shape == (3, 1)
            assert (offset is None) == fmt.signed
            assert scale.isfinite().all()
            assert (scale > 0).all()
            quantizer = Quantizer(fmt, scale, offset)
            assert_same_error(error[:, 0], quantizer, rows)
            best = full_search(rows, fmt) + 1e-12 * rows.double().square().sum(1)
            ratio = squared_error(quantizer, rows) / best.clamp(min=1e-30)
            if ratio.max() > 1.01:
                worse[kind] = round(max(worse.get(kind, 1.0), ratio.max().item()), 2)
    assert not worse, f"error over that of the best clip: {worse}"


@given(st.sampled_from([*SIGNED, *UNSIGNED]), st.sampled_from(DATA[:5]), st.sampled_from([100, 1000]), seeds)
def test_clip_is_within_a_percent_of_the_best_of_all_111_on_any_draw(name: str, kind: str, n: int, seed: int) -> None:
    fmt, rows = parse_format(name), make_rows(kind, n=n, seed=seed)
    scale, offset, _ = search_clip(SortedRows(rows), fmt)
    found = squared_error(Quantizer(fmt, scale, offset), rows)
    assert (found <= 1.01 * full_search(rows, fmt) + 1e-12 * rows.double().square().sum(1)).all()


def least_error(rows: Tensor, fmt: Format) -> Tensor:
    """The least error of each row over all scales, by the definition: every scale at which a value changes its point.

    Between two of these scales the assignment is fixed, and least squares gives the best scale for it.
    """
    results = []
    for row in rows.double():
        grid, x = fmt.grid.double(), row
        if not fmt.signed:
            low, high = row.min().clamp(max=0), row.max().clamp(min=0)
            if isinstance(fmt, IntFormat):
                grid = grid + (low / ((high - low) / fmt.max)).round()
            else:
                x = row - low
        ratios = (x[:, None] / ((grid[1:] + grid[:-1]) / 2)).flatten()
        edges = ratios[ratios > 0].unique()
        scales = torch.cat([edges[:1] / 2, (edges[1:] + edges[:-1]) / 2, edges[-1:] * 2])
        points = grid[torch.bucketize(x / scales[:, None], (grid[1:] + grid[:-1]) / 2)]
        fitted = (x * points).sum(1) / points.square().sum(1).clamp(min=1e-30)
        results.append((x - fitted[:, None] * points).square().sum(1).min())
    return torch.stack(results)


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "outlier", "one_sided", "tiny"])
@pytest.mark.parametrize("name", [*SIGNED, *UNSIGNED])
def test_clip_is_within_a_percent_of_the_best_of_all_scales(name: str, kind: str) -> None:
    fmt, rows = parse_format(name), make_rows(kind, n_rows=2, n=64)
    scale, offset, _ = search_clip(SortedRows(rows), fmt)
    found = squared_error(Quantizer(fmt, scale, offset), rows)
    assert (found <= 1.01 * least_error(rows, fmt) + 1e-12 * rows.double().square().sum(1)).all()


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "sparse", "one_sided"])
@pytest.mark.parametrize("name", ["e4m3", "e2m5", "int8", "ue4m4", "ue2m6", "uint8", "e3m2", "e2m1", "int4", "uint4"])
def test_clip_of_a_long_row_is_within_a_percent_of_the_best_of_many(name: str, kind: str) -> None:
    fmt, rows = parse_format(name), make_rows(kind, n_rows=2, n=3000)
    ordered = SortedRows(rows)
    scale, offset, error = search_clip(ordered, fmt)
    many = scale * torch.linspace(0.7, 1.4, 4000)
    offsets = None if offset is None else offset * (many / scale if isinstance(fmt, IntFormat) else torch.ones(4000))
    assert (error <= 1.01 * ordered.squared_error(fmt, many, offsets).amin(1, keepdim=True)).all()


@pytest.mark.parametrize("name", ["e4m3", "int8", "ue4m4", "uint8", "e2m1", "int4"])
def test_clip_is_at_most_a_thousandth_worse_than_the_best_of_all_111(name: str) -> None:
    fmt = parse_format(name)
    for kind in ("gaussian", "heavy", "outlier", "one_sided"):
        rows = make_rows(kind, n_rows=8, n=200)
        scale, offset, _ = search_clip(SortedRows(rows), fmt)
        assert (squared_error(Quantizer(fmt, scale, offset), rows) <= 1.001 * full_search(rows, fmt)).all()


def test_clip_may_be_far_below_a_tenth_of_an_outlier() -> None:
    fmt, rows = parse_format("int4"), torch.cat([make_rows("gaussian", 1, 20_000), torch.full((1, 1), 100.0)], 1)
    scale, offset, error = search_clip(SortedRows(rows), fmt)
    assert Quantizer(fmt, scale, offset).clip < 10
    assert error < 0.9 * full_search(rows, fmt)


@pytest.mark.parametrize("name", ["e4m3", "uint8", "int4"])
def test_clip_of_a_row_is_the_same_alone_and_again(name: str) -> None:
    fmt, rows = parse_format(name), make_rows("heavy", n_rows=5)
    scale, offset, _ = search_clip(SortedRows(rows), fmt)
    for i in (0, 4):
        alone, at, _ = search_clip(SortedRows(rows[i : i + 1]), fmt)
        assert torch.equal(alone, scale[i : i + 1])
        assert offset is None or torch.equal(at, offset[i : i + 1])
    assert torch.equal(search_clip(SortedRows(rows), fmt)[0], scale)


@pytest.mark.parametrize("name", [*SIGNED, *UNSIGNED])
def test_a_constant_row_is_exact(name: str) -> None:
    fmt, rows = parse_format(name), make_rows("constant")
    scale, offset, _ = search_clip(SortedRows(rows), fmt)
    assert (scale > 0).all()
    assert torch.allclose(Quantizer(fmt, scale, offset)(rows), rows, rtol=1e-6)


@pytest.mark.parametrize("name", ["e2m1", "e4m3", "int4", "uint4", "ue4m4"])
def test_zero_rows_stay_zero_beside_others(name: str) -> None:
    rows = torch.cat([torch.zeros(1, 50), make_rows("gaussian", 2, 50)])
    quantizer = search_tensor_error(rows, [parse_format(name)])
    result = quantizer(rows)
    assert torch.equal(result[0], torch.zeros(50))
    assert result.isfinite().all()
    alone = search_tensor_error(rows[1:], [parse_format(name)])
    assert torch.equal(result[1:], alone(rows[1:]))


@pytest.mark.parametrize("name", ["uint8", "uint4"])
@pytest.mark.parametrize("kind", DATA)
def test_zero_is_exact_in_asymmetric_integers(name: str, kind: str) -> None:
    rows = make_rows(kind)
    quantizer = search_tensor_error(rows, [parse_format(name)])
    assert quantizer(torch.zeros_like(rows)).abs().max() <= 1e-6 * quantizer.scale.max()


@pytest.mark.parametrize("name", [*SIGNED, *UNSIGNED])
def test_without_search_the_clip_is_the_largest_value(name: str) -> None:
    fmt, rows = parse_format(name), make_rows("one_sided")
    quantizer = search_tensor_error(rows, [fmt], max_only=True)
    top = (rows if not fmt.signed else rows.abs()).amax(1, keepdim=True)
    slack = quantizer.scale / 2 if isinstance(fmt, IntFormat) else 0  # the offset is a multiple of the scale
    assert ((quantizer.clip - top).abs() <= 1e-6 * top + slack).all()
    if not fmt.signed and not isinstance(fmt, IntFormat):
        assert torch.equal(quantizer.offset, rows.amin(1, keepdim=True))


# --- the format ----------------------------------------------------------------------------------------------------


@given(st.sampled_from(["fp4", "fp8", "ufp8", "fp6"]), st.sampled_from(DATA[:5]), seeds)
def test_format_is_the_one_of_least_error_over_all_rows(family: str, kind: str, seed: int) -> None:
    rows = make_rows(kind, n=150, seed=seed)
    formats = parse_formats(family)
    chosen = search_tensor_error(rows, formats)
    errors = {f.name: float(full_search(rows, f).sum()) for f in formats}
    assert squared_error(chosen, rows).sum() <= 1.01 * min(errors.values())
    assert chosen.scale.shape == (3, 1)


def test_format_follows_the_distribution() -> None:
    uniform = torch.linspace(-1, 1, 1000)[None]
    assert search_tensor_error(uniform, parse_formats("fp4")).format.name == "e1m2"
    powers = torch.exp2(-torch.arange(0, 6).float()).repeat(50)[None]
    assert search_tensor_error(powers, parse_formats("fp4")).format.name == "e3m0"
    assert search_tensor_error(powers, list(reversed(parse_formats("fp4")))).format.name == "e3m0"


def test_candidates_may_mix_signed_and_unsigned() -> None:
    formats = parse_formats(["fp8", "ufp8"])
    for kind in ("one_sided", "gaussian"):
        rows = make_rows(kind)
        best = min(formats, key=lambda f: float(full_search(rows, f).sum()))
        assert search_tensor_error(rows, formats).format == best


# --- output error --------------------------------------------------------------------------------------------------


class OutputProblem:
    """A linear layer `x @ rows.T` whose inputs differ much in size, so that some weights matter more."""

    def __init__(self, n_rows: int, n: int, rows_per_output: int, seed: int) -> None:
        self.rows = make_rows("heavy", n_rows, n, seed)
        self.per_output = rows_per_output
        generator = torch.Generator().manual_seed(seed + 1)
        importance = torch.exp(2 * torch.randn(rows_per_output * n, generator=generator))
        self.x = torch.randn(40, rows_per_output * n, generator=generator) * importance

    def error(self, quantizer: Quantizer) -> Tensor:
        difference = (quantizer(self.rows) - self.rows).reshape(-1, self.per_output * self.rows.shape[1])
        return (self.x @ difference.T).square().sum(0)

    def total(self, quantizer: Quantizer) -> Tensor:
        """In one number, as for a layer with a single scale."""
        return self.error(quantizer).sum()[None]


def least_tensor_error(problem: OutputProblem, formats: Sequence[Format]) -> list[Quantizer]:
    return [search_tensor_error(problem.rows, [f]) for f in formats]


@pytest.mark.parametrize("names", ["fp4", "fp8", "ufp8", "int4", "uint4"])
@pytest.mark.parametrize("rows_per_output", [1, 3])
def test_output_search_is_never_worse_than_the_clip_of_least_tensor_error(names: str, rows_per_output: int) -> None:
    formats = parse_formats(names)
    for seed in range(4):
        problem = OutputProblem(6, 40, rows_per_output, seed)
        chosen = search_output_error(problem.rows, formats, problem.error)
        assert chosen.scale.shape == (6, 1)
        for start in least_tensor_error(problem, formats):
            assert problem.error(chosen).sum() <= problem.error(start).sum() * (1 + 1e-6)
            if len(formats) == 1:  # every output has its own choice
                assert (problem.error(chosen) <= problem.error(start) * (1 + 1e-6)).all()


def test_output_search_finds_the_best_factor_of_each_output() -> None:
    problem = OutputProblem(6, 40, 2, seed=0)
    (fmt,) = parse_formats("e2m1")
    start = search_tensor_error(problem.rows, [fmt])
    factors = (0.5, 0.8, 1.0, 1.3)
    chosen = search_output_error(problem.rows, [fmt], problem.error, factors)
    errors = torch.stack([problem.error(Quantizer(fmt, start.scale * f)) for f in factors])
    assert len(errors.argmin(0).unique()) > 1  # outputs do differ
    assert torch.allclose(problem.error(chosen), errors.amin(0), rtol=1e-5)


def test_output_search_of_one_scale_minimises_the_total() -> None:
    problem = OutputProblem(1, 60, 1, seed=3)
    formats = parse_formats("fp4")
    factors = (0.6, 0.8, 1.0, 1.2)
    chosen = search_output_error(problem.rows, formats, problem.total, factors)
    expected = min(
        problem.total(Quantizer(start.format, start.scale * f)).item()
        for start in least_tensor_error(problem, formats)
        for f in factors
    )
    assert problem.total(chosen).item() == pytest.approx(expected, rel=1e-5)


def test_output_search_keeps_zero_exact_in_asymmetric_integers() -> None:
    problem = OutputProblem(4, 40, 1, seed=1)
    chosen = search_output_error(problem.rows, parse_formats("uint4"), problem.error, factors=(0.7, 1.1))
    assert chosen(torch.zeros_like(problem.rows)).abs().max() <= 1e-6 * chosen.scale.max()


@pytest.mark.parametrize("names", ["ue2m2", "ufp8"])
def test_output_search_leaves_an_unsigned_float_at_the_smallest_value(names: str) -> None:
    problem = OutputProblem(4, 40, 1, seed=1)
    chosen = search_output_error(problem.rows, parse_formats(names), problem.error, factors=(0.7, 1.1))
    assert torch.equal(chosen.offset, problem.rows.amin(1, keepdim=True))


def test_search_leaves_the_rows_as_they_are() -> None:
    rows = make_rows("gaussian")
    before = rows.clone()
    search_tensor_error(rows, parse_formats("fp4"))
    search_output_error(rows, parse_formats("fp4"), lambda q: squared_error(q, rows))
    assert torch.equal(rows, before)


@pytest.mark.parametrize("objective", ["tensor", "output"])
def test_the_format_of_a_tensor_is_that_of_least_total_error_and_not_of_its_worst_row(objective: str) -> None:
    """Eight rows that suit e1m2, and one of exponents that suits e3m0 and has the largest error with e1m2."""
    generator = torch.Generator().manual_seed(0)
    even = torch.rand(8, 200, generator=generator) * 2 - 1
    exponents = 2.0 ** -torch.randint(0, 7, (1, 200), generator=generator)
    formats = parse_formats(["e3m0", "e1m2"])

    def errors(rows: Tensor) -> Tensor:
        """The least error of each row with either format, `[2, rows]`."""
        return torch.stack([full_search(rows, fmt) for fmt in formats])

    # The size of the last row is such that e1m2 is better in total and worse in the worst row.
    (e3m0, e1m2), (last_e3m0, last_e1m2) = errors(even), errors(exponents)[:, 0]
    low, high = e3m0.max() / last_e1m2, (e3m0 - e1m2).sum() / (last_e1m2 - last_e3m0)
    rows = torch.cat([even, exponents * ((low + high) / 2).sqrt()])
    total, worst = errors(rows).sum(1), errors(rows).amax(1)
    assert total[1] < 0.9 * total[0]
    assert worst[1] > 1.1 * worst[0]
    if objective == "tensor":
        found = search_tensor_error(rows, formats)
    else:
        found = search_output_error(rows, formats, lambda trial: squared_error(trial, rows))
    assert found.format.name == "e1m2"
