"""The scale of least squared error for rows of values on a grid.

While every value keeps its grid point, the squared error of ``scale * point`` is a parabola in the scale. With
``A = sum(value * point)`` and ``B = sum(point^2)`` its least is ``sum(value^2) - A^2 / B``, at the scale ``A / B``. So
each scale tried stands for the best scale of its whole parabola, and ``A^2 / B`` is what has to be large. Sorted values
and their prefix sums give A and B of a scale from one rank for each decision threshold, instead of a pass over the row.

Ranks come from a table of each row first. Values close to a threshold may then go to the wrong side of it, so a scale
may look worse than it is, and never better. The tables serve to go coarse to fine: of the scales of one level, the best
are split for the next. For the last few the ranks are exact, and least squares and assignment take turns (Lloyd 1982).

Where the error is too ragged for the first level, its smallest features are as wide as the change of scale that moves
the largest value by a fraction of its step. The number of steps up to the largest value thus decides how fine to go.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_OCTAVES = 10  # below the largest scale
_PER_OCTAVE = 12  # scales of the first level
_SPLIT = 48  # best scales of the first level, which are split for the second
_SPLIT_AGAIN = 16
_PARTS_AGAIN = 4
_FINALISTS = 4
_ROUNDS = 2  # of least squares and assignment
_TABLE = 64  # entries for each decision threshold


class _Fit:
    """Some rows on a grid.

    Args:
        values: ascending in each row, `[n_rows, n]`.
        sums: of the values before each, float64 `[n_rows, n + 1]`.
        grid: ascending, float64 `[n_rows or 1, n_points]`.
        at_once: how many ranks are looked up at once.
    """

    def __init__(self, values: Tensor, sums: Tensor, grid: Tensor, at_once: int) -> None:
        self._values, self._sums = values, sums
        self._thresholds = (grid[:, 1:] + grid[:, :-1]) / 2
        step = grid.diff(dim=1)
        # What a value gives to A, in units of itself, and to B for each threshold below it.
        self._steps, self._squares = step, 2 * step * self._thresholds
        self._lowest = grid[:, :1]
        self._at_once = at_once
        # Square roots, because the steps of floating-point formats become finer towards zero.
        roots = _signed_sqrt(values[:, [0, -1]])
        length = _TABLE * step.shape[1]
        self._start = roots[:, :1].clamp(max=0)
        self._resolution = length / (roots[:, 1:].clamp(min=0) - self._start).clamp(min=1e-18)
        entries = torch.arange(length + 1, device=values.device) / self._resolution + self._start
        entries[:, 0], entries[:, -1] = -torch.inf, torch.inf  # thresholds beyond the values
        self._table = torch.searchsorted(values, entries * entries.abs())
        self._roots = _signed_sqrt(self._thresholds).float()

    def exact_ranks(self, scale: Tensor) -> Tensor:
        """How many values lie below each threshold, int64 `[n_rows, n_scales, n_thresholds]`."""
        thresholds = (scale.double()[..., None] * self._thresholds[:, None]).float()
        return torch.searchsorted(self._values, thresholds.flatten(1)).view(thresholds.shape)

    def near_ranks(self, scale: Tensor) -> Tensor:
        """The same for thresholds that are moved to the next entry of the table."""
        place = (scale.sqrt() * self._resolution)[..., None] * self._roots[:, None]
        place = (place - (self._start * self._resolution - 0.5)[..., None]).clamp_(0, self._table.shape[1] - 1)
        return self._table.gather(1, place.long().flatten(1)).view(place.shape)

    def least_squares(self, scale: Tensor, ranks: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The best scale for the assignment of each scale `[n_rows, n_scales]`, and by how much it lowers the error.

        The result is float64; 0 where all values go to zero.
        """
        at_once = max(1, self._at_once // (len(scale) * self._steps.shape[1]))
        parts = [self._least_squares(ranks(some)) for some in scale.split(at_once, 1)]
        best, gain = zip(*parts, strict=True)
        return torch.cat(best, 1), torch.cat(gain, 1)

    def _least_squares(self, ranks: Tensor) -> tuple[Tensor, Tensor]:
        n, total = self._values.shape[1], self._sums[:, -1:]
        below = self._sums.gather(1, ranks.flatten(1)).view(ranks.shape)
        product = (self._lowest + self._steps.sum(1, True)) * total - _dot(below, self._steps)
        square = n * (self._lowest.square() + self._squares.sum(1, True)) - _dot(ranks.double(), self._squares)
        scale = torch.where((product > 0) & (square > 0), product / square, 0.0)
        return scale, product * scale


def _signed_sqrt(x: Tensor) -> Tensor:
    return torch.copysign(x.abs().sqrt(), x)


def _dot(values: Tensor, weights: Tensor) -> Tensor:
    """Sums over the last dimension with weights `[n_rows or 1, n]`."""
    return values @ weights[0] if len(weights) == 1 else (values @ weights[..., None])[..., 0]


def _around(scale: Tensor, parts: int, octaves: float) -> Tensor:
    """Splits the stretch of so many octaves around each scale."""
    places = (torch.arange(parts, device=scale.device) + 0.5) / parts - 0.5
    return (scale[..., None] * torch.exp2(places * octaves)).flatten(1)


def best_scales(values: Tensor, sums: Tensor, grid: Tensor, no_clip: Tensor) -> Tensor:
    """A few scales for each row, among which is that of least squared error, or one close to it.

    They reach up to twice the scale that clips nothing. No larger one is better, for the grid of half that scale has
    the same points within the range.

    Args:
        values: ascending in each row, float32 `[n_rows, n]`.
        sums: of the values before each, float64 `[n_rows, n + 1]`.
        grid: ascending, float32 `[n_rows or 1, n_points]`; zero is one of them.
        no_clip: the least scale that clips nothing, `[n_rows, 1]`.

    Returns:
        Positive float32 scales, `[n_rows, n_scales]`.
    """
    # On a CPU as much as its caches hold; on a GPU much for every launch.
    at_once = 2**18 if values.device.type == "cpu" else 2**24
    found = []
    for rows in torch.arange(len(values)).split(max(1, at_once // (_TABLE * grid.shape[1]))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        points = grid[part] if len(grid) > 1 else grid
        fit = _Fit(values[part], sums[part], points.double(), at_once)
        found.append(_best_scales(fit, points, no_clip[part]))
    return torch.cat(found)


def _best_scales(fit: _Fit, grid: Tensor, no_clip: Tensor) -> Tensor:
    steps = float(grid.abs().amax() / (grid[0, -1] - grid[0, -2]))
    places = torch.arange(_OCTAVES * _PER_OCTAVE, device=grid.device) / _PER_OCTAVE
    tried = 2 * no_clip * torch.exp2(-places)
    found, gains = fit.least_squares(tried, fit.near_ranks)
    scales, gain, octaves = found, gains, 1 / _PER_OCTAVE
    for kept, parts in ((_SPLIT, 2 + int(steps / 8)), (_SPLIT_AGAIN, _PARTS_AGAIN)):
        tried = _around(tried.gather(1, gain.topk(kept, 1).indices), parts, octaves)
        scales, gain = fit.least_squares(tried, fit.near_ranks)
        found, gains = torch.cat([found, scales], 1), torch.cat([gains, gain], 1)
        octaves /= parts
    best = found.gather(1, gains.topk(_FINALISTS, 1).indices).float()
    for _ in range(_ROUNDS):
        best = torch.where(best > 0, best, no_clip)  # a row of zeros
        best = fit.least_squares(best, fit.exact_ranks)[0].float()
    return torch.where(best > 0, best, no_clip)
