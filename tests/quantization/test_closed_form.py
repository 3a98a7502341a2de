"""Closed-form rounding against brute force, numpy, and a textbook GPTQ."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fpq_lightning.formats.numbers import parse_format, parse_formats
from fpq_lightning.formats.scales import SCALE_FORMATS
from fpq_lightning.quantization.closed_form import (
    DAMPINGS,
    Grid,
    Problem,
    coordinate_descent,
    gptq,
    problems_of,
    refined_scales,
    solve,
)
from fpq_lightning.quantization.moments import Moments
from fpq_lightning.quantization.quantizer import Granularity, Quantizer
from fpq_lightning.quantization.search import search_tensor_error

CPU = torch.device("cpu")


def problem_of(weight: Tensor, moments: Moments, columns: list[int], centred: bool, *rest: Any) -> Problem:
    """The problem of one weight; the moments can be used again."""
    dampings, held_out = (*rest, *(DAMPINGS, None)[len(rest) :])
    (found,) = problems_of([weight], copy.deepcopy(moments), columns, centred, dampings, copy.deepcopy(held_out))
    return found


def random_problem(n: int, out: int, seed: int, m: int = 400) -> tuple[Problem, Tensor]:
    """Correlated inputs, as neighbours of a pixel are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, generator=generator) @ torch.randn(n, n, generator=generator)
    moments = Moments.zeros(1, n, CPU)
    moments.add(x[:, None], x[:, None], torch.ones(m))
    weight = torch.randn(out, n, generator=generator)
    return problem_of(weight, moments, [weight.shape[1]], centred=True), weight


def searched(weight: Tensor, formats: str, granularity: Granularity | None = None) -> Quantizer:
    rows = (granularity or Granularity("channel")).rows(weight)
    return search_tensor_error(rows, parse_formats(formats))


# --- the problem -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
def test_the_target_is_weighted_least_squares_as_numpy_solves_it(centred: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(300, 6, generator=generator) + 0.5
    x = y + 0.1 * torch.randn(300, 6, generator=generator)
    weights, weight = torch.rand(300, generator=generator), torch.randn(4, 6, generator=generator)
    moments = Moments.zeros(1, 6, CPU)
    for part in range(0, 300, 70):
        rows = slice(part, part + 70)
        moments.add(x[rows, None], y[rows, None], weights[rows])
    design = y.double().numpy()
    design = np.concatenate([design, np.ones((300, 1))], 1) if centred else design
    root = weights.double().sqrt().numpy()[:, None]
    expected = np.linalg.lstsq(design * root, (x.double() @ weight.double().T).numpy() * root, rcond=None)[0].T[:, :6]
    problem = problem_of(weight, moments, [6], centred, (0.0,))
    assert np.allclose(problem.target.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("positions", [20, 20_000])
def test_the_damping_is_that_of_least_error_on_held_out_samples(positions: int, centred: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 12, generator=generator)

    def made(n: int) -> tuple[Tensor, Tensor, Moments]:
        x = torch.randn(n, 12, generator=generator) + 0.3
        y = x + 0.5 * torch.randn(n, 12, generator=generator)
        moments = Moments.zeros(1, 12, CPU)
        moments.add(x[:, None], y[:, None], torch.ones(n))
        return x, y, moments

    (seen_x, seen_y, moments), (x, y, held_out) = made(positions), made(500)
    errors = {}
    for damping in DAMPINGS:
        target = problem_of(weight, moments, [12], centred, (damping,)).target
        bias = (seen_x.mean(0) @ weight.T - seen_y.mean(0) @ target.T) if centred else 0.0
        errors[damping] = float((x @ weight.T - y @ target.T - bias).square().mean())
    best = min(errors, key=errors.__getitem__)
    assert best == DAMPINGS[0] if positions > 1000 else best > DAMPINGS[1]
    expected, found = (problem_of(weight, moments, [12], centred, *rest) for rest in [((best,),), (DAMPINGS, held_out)])
    assert torch.allclose(found.target, expected.target, atol=1e-5)
    assert torch.allclose(found.hessian, expected.hessian, atol=1e-5)


def test_weights_that_read_the_same_have_the_problems_that_each_has_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(out, 12, generator=generator) for out in (4, 2, 6)]
    noise = torch.tensor([0.0] * 6 + [1.0] * 6)
    weights[1][:, 6:], weights[2][:, :6] = 0, 0  # so that they want other dampings

    def made(n: int) -> Moments:
        x = torch.randn(n, 12, generator=generator)
        moments = Moments.zeros(1, 12, CPU)
        moments.add(x[:, None], (x + noise * torch.randn(n, 12, generator=generator))[:, None], torch.ones(n))
        return moments

    moments, held_out = made(30), made(200)
    alone = [problem_of(weight, moments, [12], True, DAMPINGS, held_out) for weight in weights]
    together = 0
    for problem, own in zip(problems_of(weights, moments, [12], True, held_out=held_out), alone, strict=True):
        assert torch.equal(problem.target, own.target)
        assert torch.equal(problem.hessian, own.hessian)
        together += 1
    assert together == 3
    assert len({tuple(problem.hessian.diagonal(dim1=1, dim2=2).flatten().tolist()) for problem in alone}) > 1


def test_inputs_that_were_never_seen_keep_their_weights_and_break_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=generator)
    x[:, 5:] = 0
    moments = Moments.zeros(1, 8, CPU)
    moments.add(x[:, None], x[:, None], torch.ones(50))
    weight = torch.randn(3, 8, generator=generator)
    problem = problem_of(weight, moments, [weight.shape[1]], centred=True)
    assert torch.allclose(problem.target[:, 5:], weight[:, 5:], atol=1e-4)
    found = solve(problem, weight, [searched(weight, "e2m1")])
    assert found.values.isfinite().all()
    few = Moments.zeros(1, 8, CPU)
    few.add(x[:2, None], x[:2, None], torch.ones(2))  # fewer positions than inputs
    assert solve(problem_of(weight, few, [8], True), weight, [searched(weight, "e2m1")]).values.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_moments_tell_inputs_that_are_not_finite(value: float) -> None:
    moments, x = Moments.zeros(1, 3, CPU), torch.ones(4, 3)
    moments.add(x[:, None], x[:, None], torch.ones(4))
    assert moments.are_usable
    x[1, 2] = value
    moments.add(x[:, None], x[:, None], torch.ones(4))
    assert not moments.are_usable


# --- the solvers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", ["e2m1", "e1m2", "e3m0", "int4"])
def test_small_problems_are_solved_nearly_as_well_as_by_trying_everything(formats: str) -> None:
    ratios = []
    for seed in range(15):
        problem, weight = random_problem(3, 1, seed)
        quantizer = searched(weight, formats)
        found = solve(problem, weight, [quantizer])
        grid = (quantizer.format.grid * found.quantizers[0].current_scale().item()).tolist()
        best = min(problem.error(torch.tensor([q])).item() for q in itertools.product(grid, repeat=3))
        assert found.error >= best * (1 - 1e-4)
        ratios.append(found.error / best)
    assert sum(ratio < 1.001 for ratio in ratios) >= 10
    assert np.exp(np.mean(np.log(ratios))) < 1.3


def textbook_gptq(target: np.ndarray, hessian: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """OBQ in a fixed order: after each column the rest moves to the optimum given what is rounded (float64)."""
    n = len(hessian)
    left, q = target.copy(), np.zeros_like(target)
    for j in range(n):
        q[:, j] = grid[np.abs(left[:, j, None] - grid).argmin(1)]
        rest = slice(j + 1, n)
        if j + 1 < n:
            # The best change of the rest for an error e in column j: -(H_rr)^-1 H_rj e.
            change = np.linalg.solve(hessian[rest, rest], hessian[rest, j])
            left[:, rest] += np.outer(left[:, j] - q[:, j], change)
    return q


def test_gptq_is_optimal_brain_quantization_in_its_order() -> None:
    problem, _ = random_problem(20, 5, seed=3)
    quantizer = Quantizer(parse_format("e2m1"), torch.tensor(0.4))
    order = problem.hessian[0].diagonal().argsort(descending=True)
    hessian = problem.hessian[0, order][:, order].double().numpy()
    grid = (quantizer.format.grid * 0.4).double().numpy()
    expected = textbook_gptq(problem.target[:, order].double().numpy(), hessian, grid)
    found = gptq(problem, Grid([quantizer], [20], 5))[:, order].numpy()
    assert (np.abs(found - expected) < 1e-4).mean() > 0.97  # a value between two may fall to either side


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from(["e2m1", "e3m0", "int4", "e4m3"]))
def test_no_solution_is_worse_than_rounding_to_nearest(n: int, out: int, seed: int, formats: str) -> None:
    problem, weight = random_problem(n, out, seed, m=60)
    quantizer = searched(weight, formats)
    grid = Grid([quantizer], [n], out)
    nearest = grid.nearest(weight)
    assert torch.equal(nearest, quantizer(weight))
    before = problem.error(nearest)
    moved = coordinate_descent(problem, grid, nearest)
    assert (problem.error(moved) <= before * (1 + 1e-4) + 1e-6).all()
    assert torch.allclose(grid.nearest(moved), moved, rtol=1e-6, atol=0)  # still on the grid
    assert solve(problem, weight, [quantizer]).error <= before.double().sum().item() * (1 + 1e-4) + 1e-6


def test_correlated_inputs_gain_much() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 16, generator=generator) @ torch.randn(16, 150, generator=generator)
    x += 0.3 * torch.randn(2000, 150, generator=generator)
    moments = Moments.zeros(1, 150, CPU)
    moments.add(x[:, None], x[:, None], torch.ones(2000))
    weight = torch.randn(30, 150, generator=generator) / 12
    quantizer = searched(weight, "fp4")
    problem = problem_of(weight, moments, [weight.shape[1]], centred=True)
    assert solve(problem, weight, [quantizer]).error < 0.1 * problem.error(quantizer(weight)).sum().item()


@pytest.mark.parametrize("granularity", [Granularity("tensor"), Granularity("channel"), Granularity("group", 5)])
def test_refined_scales_are_no_worse_and_for_one_scale_a_channel_those_of_least_squares(
    granularity: Granularity,
) -> None:
    problem, weight = random_problem(20, 6, seed=1)
    quantizer = searched(weight, "e2m1", granularity)
    grid = Grid([quantizer], [20], 6)
    q = coordinate_descent(problem, grid, grid.nearest(weight))
    refined = refined_scales(problem, grid, q)
    codes = quantizer.encode(granularity.rows(q))
    placed = refined.quantizers[0].decode(codes).reshape(6, 20)
    assert problem.error(placed).sum() <= problem.error(q).sum() * (1 + 1e-5)
    if granularity.kind == "channel":
        root = np.linalg.cholesky(problem.hessian[0].double().numpy())
        for row, target, scale in zip(q / quantizer.current_scale(), problem.target, refined.scale[:, 0], strict=True):
            a, b = row.double().numpy() @ root, target.double().numpy() @ root
            assert scale.item() == pytest.approx(a @ b / (a @ a), rel=1e-4)


def test_scales_of_a_format_of_their_own_stay_and_parts_have_grids_of_their_own() -> None:
    problem, weight = random_problem(24, 4, seed=2)
    left, right = weight[:, :16], weight[:, 16:]
    block = search_tensor_error(
        Granularity("group", 8).rows(left), parse_formats("e2m1"), scale_format=SCALE_FORMATS["float8_e4m3fn"]
    )
    other = searched(right.contiguous(), "e1m2")
    problem = Problem(problem.target, problem.hessian, (16, 8))
    found = solve(problem, weight, [block, other])
    assert torch.equal(found.quantizers[0].current_scale(), block.current_scale())
    for quantizer, part, rows in zip(found.quantizers, found.values.split([16, 8], dim=1), (8, 1), strict=True):
        flat = part.reshape(4 * 16 // 8, 8) if rows == 8 else part
        assert torch.allclose(quantizer(flat.contiguous()), flat, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e3, 1e15])
def test_inputs_that_never_change_end_in_a_sound_answer(value: float) -> None:
    """Their covariance is nothing but rounding errors."""
    x = torch.full((500, 1, 40), value) * torch.linspace(0.5, 1.5, 40)
    moments = Moments.zeros(1, 40, CPU)
    for part in x.split(77):
        moments.add(part, part, torch.ones(len(part)))
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    assert moments.are_usable
    problem = problem_of(weight, moments, [40], centred=True)
    assert solve(problem, weight, [searched(weight, "e2m1")]).values.isfinite().all()


def test_groups_are_solved_as_layers_of_their_own_are() -> None:
    generator = torch.Generator().manual_seed(4)
    mixing = torch.randn(2, 9, 9, generator=generator)
    x = torch.einsum("mgn,gnk->mgk", torch.randn(300, 2, 9, generator=generator), mixing)
    y = x + 0.05 * torch.randn(300, 2, 9, generator=generator)
    weight, weights = torch.randn(8, 9, generator=generator), torch.rand(300, generator=generator)
    quantizer = searched(weight, "e2m1")

    def solved(groups: slice, rows: slice) -> tuple[Tensor, Tensor]:
        moments = Moments.zeros(groups.stop - groups.start, 9, CPU)
        moments.add(x[:, groups], y[:, groups], weights)
        problem = problem_of(weight[rows], moments, [9], centred=True)
        own = Quantizer(quantizer.format, quantizer.current_scale()[rows])
        values = coordinate_descent(problem, Grid([own], [9], len(weight[rows])), own(weight[rows]))
        return values, moments.mean_shift(weight[rows], values)

    values, shift = solved(slice(0, 2), slice(0, 8))
    for g, rows in enumerate((slice(0, 4), slice(4, 8))):
        alone, own_shift = solved(slice(g, g + 1), rows)
        assert torch.allclose(values[rows], alone, atol=1e-5)
        assert torch.allclose(shift[rows], own_shift, atol=1e-5)
        full = (x[:, g] * weights[:, None]).sum(0) @ weight[rows].T
        expected = (full - (y[:, g] * weights[:, None]).sum(0) @ values[rows].T) / weights.sum()
        assert torch.allclose(shift[rows], expected, atol=1e-4)
