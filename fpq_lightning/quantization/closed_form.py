"""Rounding in closed form: grid values of least output error, from second moments of a layer's inputs.

A row w of a layer sees inputs x in the full-precision network and y in the quantized one. Over rows q on the grid and
biases, ``E |w x + b - q y - c|^2`` is least for the bias of the means, ``c = b + w E[x] - q E[y]``, and for the q that
minimises ``(t - q) H (t - q)^T`` with the centred moments ``H = cov(y, y)``, ``C = cov(x, y)`` and the target
``t = w C H^-1`` (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). Two solvers follow one another: GPTQ (arXiv
2210.17323) rounds the columns in turn and lets the later ones make up for each error; coordinate descent (QuantEase,
arXiv 2309.01885) then moves one column at a time to the grid value that is best given all others, which never makes the
error larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count

import torch
from torch import Tensor

from fpq_lightning.formats.numbers import Format
from fpq_lightning.formats.scales import parse_scale_format
from fpq_lightning.kernels import ops
from fpq_lightning.quantization.moments import Moments
from fpq_lightning.quantization.quantizer import Granularity, Quantizer
from fpq_lightning.quantization.search import search_output_error

_SWEEPS = 1  # of coordinate descent, before the scales are refined and after
DAMPINGS = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # of the mean diagonal of H

_TIE = 1e-8  # of the outputs' energy; less is rounding of float32


@dataclass(frozen=True)
class Problem:
    """``(target - q) H (target - q)^T`` for every output channel.

    Attributes:
        target: float32 `[out, n]`, the channels of a group next to each other.
        hessian: H, float32 `[groups, n, n]`, positive definite.
        columns: of each part of the weight, which has a quantizer of its own; n in all.
    """

    target: Tensor
    hessian: Tensor
    columns: tuple[int, ...]

    def error(self, q: Tensor) -> Tensor:
        """What is minimised, float32 `[out]`."""
        difference = self.target - q
        return (_times(difference, self.hessian) * difference).sum(1)

    def part(self, i: int) -> Problem:
        """The problem of a part alone."""
        if len(self.columns) == 1:
            return self
        run = slice(sum(self.columns[:i]), sum(self.columns[: i + 1]))
        return Problem(self.target[:, run], self.hessian[:, run, run], (self.columns[i],))

    @cached_property
    def order(self) -> Tensor:
        """The columns as GPTQ takes them: part after part, the largest second moments first, int64 `[n]`."""
        parts = self.hessian.diagonal(dim1=1, dim2=2).mean(0).split(self.columns)
        starts = [sum(self.columns[:i]) for i in range(len(self.columns))]
        return torch.cat([part.argsort(descending=True) + start for part, start in zip(parts, starts, strict=True)])

    @cached_property
    def factor(self) -> Tensor:
        """The upper triangular U with ``H^-1 = U^T U``, columns in `order`, float32 `[groups, n, n]`.

        With the columns reversed, ``H = L L^T`` gives ``U = L^-1``, reversed again.
        """
        backwards = self.order.flip(0)
        inverse = _inverse_factor(self.hessian[:, backwards[:, None], backwards])
        return inverse.flip(1, 2)


def _times(rows: Tensor, matrices: Tensor) -> Tensor:
    """Products of rows `[out, m]` with the matrix of their group, of `[groups, m, k]`."""
    return (rows.unflatten(0, (len(matrices), -1)) @ matrices).flatten(0, 1)


def _inverse_factor(matrices: Tensor) -> Tensor:
    """The inverses of the lower Cholesky factors of matrices."""
    lower, _ = torch.linalg.cholesky_ex(matrices)
    del matrices  # they are large
    eye = torch.eye(lower.shape[1], device=lower.device).expand_as(lower)
    return torch.linalg.solve_triangular(lower, eye, upper=False)


def problems_of(
    weights: Sequence[Tensor],
    moments: Moments,
    columns: Sequence[int],
    centred: bool,
    dampings: Sequence[float] = DAMPINGS,
    held_out: Moments | None = None,
) -> Iterator[Problem]:
    """The least-squares problems of weights that read the same inputs, one after the other.

    The target is damped towards the weight itself (ridge regression), so that inputs that were not seen keep their
    weights. How much is right depends on how many samples there are and on what they are to teach: of some dampings the
    one whose target has the least output error on held-out samples is taken.

    The matrices may take most of the memory. So those of the moments are used up, and a problem holds good until the
    next is asked for.

    Args:
        weights: full precision, float32 `[out, n]` each.
        moments: of the inputs.
        columns: of each part of a weight.
        centred: whether a bias takes the means.
        dampings: to choose from, ascending, added to the diagonal of H, relative to its mean; more than the last where
            rounding errors need it.
        held_out: moments of the inputs of other samples; without them the first damping is taken.
    """
    mean_x, mean_y = (mean.float() for mean in moments.means)
    means = (mean_x, mean_y) if centred else None
    size = moments.yy.diagonal(dim1=1, dim2=2).mean(1) / moments.weight.float()
    hessian, cross = moments.take_second(means)
    judged = None if held_out is None else held_out.take_second(means)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    # Of inputs that hardly vary around a large mean rounding errors alone are left, which may be negative.
    mean = torch.maximum(diagonal.mean(1), 1e-6 * size)
    found = [_damped(weight, hessian, cross, mean, dampings, judged) for weight in weights]
    del cross, judged
    undamped = diagonal.clone()
    for target, ridge in found:
        diagonal.copy_(undamped + ridge[:, None])
        yield Problem(target, hessian, tuple(columns))


def _damped(
    weight: Tensor,
    hessian: Tensor,
    cross: Tensor,
    mean: Tensor,
    dampings: Sequence[float],
    judged: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """The target of a weight, and what is added to the diagonal for it; the matrices are as they were afterwards."""
    diagonals = [matrix.diagonal(dim1=1, dim2=2) for matrix in (hessian, cross)]
    before = [diagonal.clone() for diagonal in diagonals]
    best: tuple[float, Tensor, Tensor] | None = None  # error, target, ridge
    further = (10.0**power for power in count(1))
    for damping in chain(dampings, (max(dampings[-1], DAMPINGS[0]) * factor for factor in further)):
        ridge = (damping * mean).clamp(min=1e-12)
        for diagonal, own in zip(diagonals, before, strict=True):
            diagonal.copy_(own + ridge[:, None])
        target = _solution(hessian, _times(weight, cross))
        if target is None:
            continue
        error = 0.0 if judged is None else _error_of(target, weight, *judged)
        if best is None or error < best[0] - _TIE:
            best = error, target, ridge
        if judged is None or damping >= dampings[-1]:
            break
    for diagonal, own in zip(diagonals, before, strict=True):
        diagonal.copy_(own)
    assert best is not None
    return best[1:]


def _solution(hessian: Tensor, rows: Tensor) -> Tensor | None:
    """``rows H^-1`` for rows `[out, n]`, None if H is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(hessian)
    if info.any():
        return None
    return torch.cholesky_solve(rows.unflatten(0, (len(hessian), -1)).mT, factor).mT.flatten(0, 1)


def _error_of(target: Tensor, weight: Tensor, hessian: Tensor, cross: Tensor) -> float:
    """Squared error of a target's outputs, less that of the weight itself, relative to the outputs' energy."""
    change, own = target - weight, _times(weight, hessian)
    error = (_times(change, hessian) - 2 * (_times(weight, cross) - own)) * change
    return float(error.sum() / (own * weight).sum().clamp(min=1e-30))


class Grid:
    """The grids of the columns of a weight `[out, n]`.

    Args:
        quantizers: one for each part of the columns, of the rows of the granularity.
        columns: of each part.
        out: output channels.
    """

    def __init__(self, quantizers: Sequence[Quantizer], columns: Sequence[int], out: int) -> None:
        self.quantizers, self.columns = list(quantizers), list(columns)
        parts = list(zip(quantizers, columns, strict=True))
        self.scale = torch.cat([_by_column(q.current_scale().detach(), out, n) for q, n in parts], dim=1)
        zero = self.scale.new_zeros(1)
        self.offset = torch.cat([_by_column(zero if q.offset is None else q.offset, out, n) for q, n in parts], dim=1)

    def nearest(self, values: Tensor) -> Tensor:
        """The nearest values of the grid, `[out, n]`."""
        parts = zip(self.quantizers, values.split(self.columns, dim=1), strict=True)
        return torch.cat([_of_rows(q, part.contiguous()) for q, part in parts], dim=1)

    def blocks(self, order: Tensor | None = None) -> Iterator[tuple[slice, Tensor | slice, Format]]:
        """Runs of columns of one format: where they lie in an order, which columns they are, and their format."""
        start = 0
        for quantizer, n in zip(self.quantizers, self.columns, strict=True):
            for first in range(start, start + n, ops.MAX_COLUMNS):
                run = slice(first, min(first + ops.MAX_COLUMNS, start + n))
                yield run, run if order is None else order[run], quantizer.format
            start += n


def _of_rows(quantizer: Quantizer, part: Tensor) -> Tensor:
    """The nearest values of a quantizer of rows for part of a weight, `[out, n]`."""
    scale = quantizer.current_scale().detach()
    return quantizer(part.reshape(scale.numel(), -1)).detach().reshape(part.shape)


def _by_column(parameter: Tensor, out: int, n: int) -> Tensor:
    """Scales or offsets of rows as those of every weight, `[out, n]`."""
    if parameter.numel() in (1, out):
        return parameter.reshape(-1, 1).expand(out, n)
    return parameter.reshape(out, -1).repeat_interleave(n * out // parameter.numel(), dim=1)


def gptq(problem: Problem, grid: Grid) -> Tensor:
    """Grid values `[out, n]` by GPTQ, in the order of the problem."""
    order, factor = problem.order, problem.factor
    left, q = problem.target[:, order], torch.empty_like(problem.target)
    for run, columns, fmt in grid.blocks(order):
        scale, offset = grid.scale[:, columns], grid.offset[:, columns]
        q[:, columns], errors = ops.compensate_columns(left[:, run], factor[:, run, run], scale, offset, fmt)
        left[:, run.stop :] -= _times(errors, factor[:, run, run.stop :])
    return q


def coordinate_descent(problem: Problem, grid: Grid, q: Tensor, sweeps: int = _SWEEPS) -> Tensor:
    """Grid values `[out, n]` of no larger error than `q`, a column at a time."""
    hessian, q = problem.hessian, q.clone()
    gradient = _times(problem.target - q, hessian)
    for _ in range(sweeps):
        for run, _, fmt in grid.blocks():
            moved = ops.descend_columns(
                q[:, run], gradient[:, run], hessian[:, run, run], grid.scale[:, run], grid.offset[:, run], fmt
            )
            gradient -= _times(moved - q[:, run], hessian[:, run])
            q[:, run] = moved
    return q


def _unrounded(problem: Problem, grid: Grid, q: Tensor) -> Tensor:
    """The best value of each weight given all others, or its grid value where that is not the nearest to it."""
    gradient = _times(problem.target - q, problem.hessian)
    diagonal = problem.hessian.diagonal(dim1=1, dim2=2).repeat_interleave(len(q) // len(problem.hessian), dim=0)
    best = q + gradient / diagonal
    return torch.where((grid.nearest(best) - q).abs() < 1e-3 * grid.scale, best, q)


def refined_scales(problem: Problem, grid: Grid, q: Tensor) -> Grid:
    """The grid with the scales of least error for the codes of `q`, one group of columns after the other.

    Scales with a format of their own stay, and so do those with offsets, and scales that would not be positive.
    """
    out = len(q)
    gradient = _times(problem.target - q, problem.hessian)
    quantizers, start = [], 0
    for quantizer, n in zip(grid.quantizers, grid.columns, strict=True):
        first, start = start, start + n
        if quantizer.scale_format is not None or quantizer.offset is not None:
            quantizers.append(quantizer)
            continue
        scale = quantizer.current_scale().detach().clone()
        blocks = max(1, scale.numel() // out)
        table = scale.reshape(-1, blocks)  # [out or 1, blocks], a view
        size = n // blocks
        for g in range(blocks):
            columns = slice(first + g * size, first + (g + 1) * size)
            unit = q[:, columns] / table[:, g : g + 1]
            product = _times(unit, problem.hessian[:, columns, columns])
            down, up = (product * unit).sum(1), (gradient[:, columns] * unit).sum(1)
            if len(table) == 1:
                down, up = down.sum(0, keepdim=True), up.sum(0, keepdim=True)
            step = up / down.clamp(min=1e-30)
            step = torch.where((table[:, g] + step > 0) & step.isfinite(), step, 0.0)
            table[:, g] += step
            gradient = gradient - _times(step[:, None] * unit, problem.hessian[:, columns])
        quantizers.append(Quantizer(quantizer.format, scale))
    return Grid(quantizers, grid.columns, out)


@dataclass(frozen=True)
class Solution:
    """Grid values of a weight.

    Attributes:
        quantizers: formats and scales of its parts.
        values: `[out, n]`, on the grid.
        unrounded: what `values` are the nearest of: the best of each weight given all others, `[out, n]`.
        error: of the problem, summed over output channels.
    """

    quantizers: list[Quantizer]
    values: Tensor
    unrounded: Tensor
    error: float


def search_formats(
    problem: Problem, weight: Tensor, formats: Sequence[Format], granularity: Granularity
) -> list[Quantizer]:
    """Format and scales of each part with the least error after GPTQ, from the clips of least tensor error.

    Args:
        problem: of the weight.
        weight: full precision, float32 `[out, n]`.
        formats: the candidates.
        granularity: of the scales.
    """
    found = []
    for i, part in enumerate(weight.split(problem.columns, dim=1)):
        own, columns = problem.part(i), (part.shape[1],)

        def error(trial: Quantizer, own: Problem = own, columns: tuple[int] = columns) -> Tensor:
            by_channel = own.error(gptq(own, Grid([trial], columns, len(weight))))
            return by_channel.sum(0, keepdim=True) if granularity.kind == "tensor" else by_channel

        rows, scale_format = granularity.rows(part.contiguous()), parse_scale_format(granularity.scale_format)
        found.append(search_output_error(rows, formats, error, factors=(1.0,), scale_format=scale_format))
    return found


def solve(problem: Problem, weight: Tensor, quantizers: Sequence[Quantizer]) -> Solution:
    """GPTQ, then coordinate descent, and again with refined scales; never worse than rounding to nearest.

    Args:
        problem: of the weight.
        weight: full precision, float32 `[out, n]`.
        quantizers: format and scales to start from, of each part.
    """
    out = len(weight)
    grid = Grid(quantizers, problem.columns, out)
    nearest = grid.nearest(weight)

    def improved(grid: Grid, start: Tensor) -> Solution:
        values = coordinate_descent(problem, grid, start)
        error = problem.error(values).double().sum().item()
        return Solution(grid.quantizers, values, _unrounded(problem, grid, values), error)

    found = gptq(problem, grid)
    better = problem.error(found) < problem.error(nearest)  # not so where factors are no numbers
    best = improved(grid, torch.where(better[:, None], found, nearest))
    grid = refined_scales(problem, grid, best.values)
    refined = improved(grid, grid.nearest(best.values))
    return refined if refined.error < best.error else best
