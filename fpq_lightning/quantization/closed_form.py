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

import torch
from torch import Tensor

from fpq_lightning.formats.numbers import Format
from fpq_lightning.kernels import ops
from fpq_lightning.quantization.quantizer import Quantizer

_SWEEPS = 2
_DAMPING = 1e-2  # of the mean diagonal of H


@dataclass
class Moments:
    """Weighted sums over positions of a layer's inputs, float64.

    Attributes:
        weight: sum of the weights, `[]`.
        x: sum of the full-precision inputs, `[n]`.
        y: sum of the quantized network's inputs, `[n]`.
        yy: sum of ``y y^T``, `[n, n]`.
        xy: sum of ``x y^T``, `[n, n]`.
    """

    weight: Tensor
    x: Tensor
    y: Tensor
    yy: Tensor
    xy: Tensor

    @classmethod
    def zeros(cls, n: int, device: torch.device) -> Moments:
        """Moments of no positions."""
        shapes = ((), (n,), (n,), (n, n), (n, n))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Adds positions.

        Args:
            x: full-precision inputs, `[m, n]`.
            y: the quantized network's inputs at the same positions, `[m, n]`.
            weights: of the positions, `[m]`.
        """
        weighted = y.float() * weights[:, None]
        self.weight += weights.double().sum()
        self.y += weighted.double().sum(0)
        self.x += (x.float() * weights[:, None]).double().sum(0)
        self.yy += weighted.T @ y.float()
        self.xy += x.float().T @ weighted

    @property
    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        return all(bool(t.isfinite().all()) for t in (self.weight, self.x, self.y, self.yy, self.xy))


@dataclass(frozen=True)
class Problem:
    """``(target - q) H (target - q)^T`` for every output channel.

    Attributes:
        target: float32 `[out, n]`.
        hessian: H, float32 `[n, n]`, positive definite.
    """

    target: Tensor
    hessian: Tensor

    def error(self, q: Tensor) -> Tensor:
        """What is minimised, `[out]`."""
        difference = self.target - q
        return (difference @ self.hessian * difference).sum(1)


def problem_of(weight: Tensor, moments: Moments, centred: bool, damping: float = _DAMPING) -> Problem:
    """The least-squares problem of a weight.

    The target is damped towards the weight itself, so that inputs that were not seen keep their weights.

    Args:
        weight: full precision `[out, n]`.
        moments: of the inputs.
        centred: whether a bias takes the means.
        damping: added to the diagonal of H, relative to its mean.
    """
    total = moments.weight.clamp(min=1e-30)
    hessian, cross = moments.yy / total, moments.xy / total
    if centred:
        mean_x, mean_y = moments.x / total, moments.y / total
        hessian = hessian - torch.outer(mean_y, mean_y)
        cross = cross - torch.outer(mean_x, mean_y)
    ridge = (damping * hessian.diagonal().mean()).clamp(min=1e-12)
    hessian.diagonal().add_(ridge)
    cross.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(hessian)
    target = torch.cholesky_solve((weight.double() @ cross).T, factor).T
    return Problem(target.float(), hessian.float())


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
    """Grid values `[out, n]` by GPTQ; of each part the columns with the largest second moments come first."""
    diagonal, start, orders = problem.hessian.diagonal(), 0, []
    for n in grid.columns:
        orders.append(diagonal[start : start + n].argsort(descending=True) + start)
        start += n
    order = torch.cat(orders)
    hessian = problem.hessian[order][:, order].double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left, q = problem.target[:, order], torch.empty_like(problem.target)
    for run, columns, fmt in grid.blocks(order):
        scale, offset = grid.scale[:, columns], grid.offset[:, columns]
        q[:, columns], errors = ops.compensate_columns(left[:, run], factor[run, run], scale, offset, fmt)
        left[:, run.stop :] -= errors @ factor[run, run.stop :]
    return q


def coordinate_descent(problem: Problem, grid: Grid, q: Tensor, sweeps: int = _SWEEPS) -> Tensor:
    """Grid values `[out, n]` of no larger error than `q`, a column at a time."""
    hessian, q = problem.hessian, q.clone()
    gradient = (problem.target - q) @ hessian
    for _ in range(sweeps):
        for run, _, fmt in grid.blocks():
            moved = ops.descend_columns(
                q[:, run], gradient[:, run], hessian[run, run], grid.scale[:, run], grid.offset[:, run], fmt
            )
            gradient -= (moved - q[:, run]) @ hessian[run]
            q[:, run] = moved
    return q


def refined_scales(problem: Problem, grid: Grid, q: Tensor) -> Grid:
    """The grid with the scales of least error for the codes of `q`, one group of columns after the other.

    Scales with a format of their own stay, and so do those with offsets, and scales that would not be positive.
    """
    out = len(q)
    gradient = (problem.target - q) @ problem.hessian
    quantizers, start = [], 0
    for quantizer, n in zip(grid.quantizers, grid.columns, strict=True):
        first, start = start, start + n
        if quantizer.scale_format is not None or quantizer.offset is not None:
            quantizers.append(quantizer)
            continue
        scale = quantizer.current_scale().detach().clone()
        groups = max(1, scale.numel() // out)
        table = scale.reshape(-1, groups)  # [out or 1, groups], a view
        size = n // groups
        for g in range(groups):
            columns = slice(first + g * size, first + (g + 1) * size)
            unit = q[:, columns] / table[:, g : g + 1]
            product = unit @ problem.hessian[columns, columns]
            down, up = (product * unit).sum(1), (gradient[:, columns] * unit).sum(1)
            if len(table) == 1:
                down, up = down.sum(0, keepdim=True), up.sum(0, keepdim=True)
            step = up / down.clamp(min=1e-30)
            step = torch.where((table[:, g] + step > 0) & step.isfinite(), step, 0.0)
            table[:, g] += step
            gradient = gradient - (step[:, None] * unit) @ problem.hessian[columns]
        quantizers.append(Quantizer(quantizer.format, scale))
    return Grid(quantizers, grid.columns, out)


@dataclass(frozen=True)
class Solution:
    """Grid values of a weight.

    Attributes:
        quantizers: formats and scales of its parts.
        values: `[out, n]`, on the grid.
        error: of the problem, summed over output channels.
    """

    quantizers: list[Quantizer]
    values: Tensor
    error: float


def solve(
    problem: Problem, weight: Tensor, quantizers: Sequence[Quantizer], columns: Sequence[int], rounds: int = 1
) -> Solution:
    """GPTQ, then coordinate descent, and scales and values in turn; never worse than rounding to nearest.

    Args:
        problem: of the weight.
        weight: full precision `[out, n]`.
        quantizers: format and scales to start from, one for each part of the columns.
        columns: of each part.
        rounds: how often scales and values are refined in turn.
    """
    out = len(weight)
    grid = Grid(quantizers, columns, out)
    nearest = grid.nearest(weight)

    def improved(grid: Grid, start: Tensor) -> Solution:
        values = coordinate_descent(problem, grid, start)
        return Solution(grid.quantizers, values, problem.error(values).double().sum().item())

    found = gptq(problem, grid)
    better = problem.error(found) < problem.error(nearest)
    best = improved(grid, torch.where(better[:, None], found, nearest))
    for _ in range(rounds):
        grid = refined_scales(problem, Grid(best.quantizers, columns, out), best.values)
        refined = improved(grid, grid.nearest(best.values))
        if not refined.error < best.error:
            break
        best = refined
    return best
