"""Search of format and clip.

The error of a format and a scale is exact: between two neighbouring decision thresholds every value goes to the same
grid point, so it follows from the sorted values and their prefix sums. Kuzmin et al. 2022 try clips in
``linspace(0.1, 1.2, 111) * max|x|`` for every format. The error is ragged in the clip, above all in 8 bits, so the
scale of least error is searched on all levels instead (`scale_search`).
Where scales have a format of their own, the candidates are all of its numbers from the least of these clips on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fpq_lightning.formats.numbers import Format, IntFormat
from fpq_lightning.formats.scales import ScaleFormat
from fpq_lightning.quantization.quantizer import Quantizer
from fpq_lightning.quantization.scale_search import best_scales

CLIPS = torch.linspace(0.1, 1.2, 111)
_CHUNK = 2**24  # thresholds looked up at once; bounds memory to a few hundred MB


class SortedRows:
    """Rows sorted once, for the squared error of any number of quantizers.

    Args:
        rows: finite values `[n_rows, n]`.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows.float()

    @cached_property
    def low(self) -> Tensor:
        """The smallest value of each row, `[n_rows, 1]`."""
        return self._rows.amin(1, keepdim=True)

    @cached_property
    def high(self) -> Tensor:
        """The largest value of each row, `[n_rows, 1]`."""
        return self._rows.amax(1, keepdim=True)

    @property
    def magnitude(self) -> Tensor:
        """The largest magnitude of each row, `[n_rows, 1]`."""
        return torch.maximum(self.high.abs(), self.low.abs()).clamp(min=1e-12)

    @cached_property
    def magnitudes(self) -> SortedRows:
        """The magnitudes of the values."""
        return SortedRows(self._rows.abs())

    @cached_property
    def heights(self) -> SortedRows:
        """The values above the smallest one, or above zero if all are positive."""
        return SortedRows(self._rows - self.low.clamp(max=0))

    @cached_property
    def values(self) -> Tensor:
        """Ascending, `[n_rows, n]`."""
        return _sorted(self._rows)

    @cached_property
    def sums(self) -> Tensor:
        """Of the values before each, float64 `[n_rows, n + 1]`."""
        return torch.nn.functional.pad(self.values, (1, 0)).cumsum(1, dtype=torch.float64)

    @cached_property
    def _energy(self) -> Tensor:
        return torch.linalg.vector_norm(self.values, dim=1, keepdim=True, dtype=torch.float64).square()

    def squared_error(self, fmt: Format, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """Sum of squared quantization errors.

        Args:
            fmt: the format.
            scale: `[n_rows, n_candidates]`.
            offset: `[n_rows, n_candidates]` or None.

        Returns:
            float64 `[n_rows, n_candidates]`.
        """
        grid = fmt.grid.to(scale.device)[None]
        if offset is None and fmt.min == -fmt.max:  # a symmetric grid sees magnitudes only
            return self.magnitudes.grid_errors(grid[:, grid[0] >= 0], scale)
        return self.grid_errors(grid, scale, offset)

    def grid_errors(self, grid: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """The same for the points of a grid, ascending, `[n_rows or 1, n_points]`."""
        points = grid.shape[1]
        rows_at_once = max(1, _CHUNK // points)
        at_once = max(1, _CHUNK // (points * min(len(scale), rows_at_once)))
        parts = []
        for rows in torch.arange(len(scale)).split(rows_at_once):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            scales = scale[part].split(at_once, 1)
            offsets = [None] * len(scales) if offset is None else offset[part].split(at_once, 1)
            g = grid[part] if len(grid) > 1 else grid
            found = [self._squared_error(g, part, s, o) for s, o in zip(scales, offsets, strict=True)]
            parts.append(torch.cat(found, 1))
        return torch.cat(parts)

    def _squared_error(self, grid: Tensor, part: slice, scale: Tensor, offset: Tensor | None) -> Tensor:
        rows, candidates = scale.shape
        values, total = self.values[part], self.sums[part]
        shift = 0.0 if offset is None else offset.double()[..., None]
        points = scale.double()[..., None] * grid.double()[:, None] + shift
        thresholds = ((points[..., 1:] + points[..., :-1]) / 2).float()
        below = torch.searchsorted(values, thresholds.reshape(rows, -1))
        count = torch.diff(
            below.reshape(rows, candidates, -1),
            prepend=below.new_zeros(rows, candidates, 1),
            append=below.new_full((rows, candidates, 1), values.shape[1]),
        )
        sums = torch.diff(
            total.gather(1, below).reshape(rows, candidates, -1),
            prepend=total.new_zeros(rows, candidates, 1),
            append=total[:, -1:, None].expand(rows, candidates, 1),
        )
        return self._energy[part] + (points * (points * count - 2 * sums)).sum(-1)


def _sorted(rows: Tensor) -> Tensor:
    if rows.device.type == "cpu":
        return torch.from_numpy(np.sort(rows.numpy(), axis=1))  # 30 times as fast as torch's
    return rows.sort(dim=1).values


class _Placed(NamedTuple):
    """What is to be approximated by a scale times the points of a grid.

    Attributes:
        rows: the values, their magnitudes if the format is symmetric, or their heights above the offset.
        grid: the points, `[n_rows or 1, n_points]`.
        no_clip: the least scale that clips nothing, `[n_rows, 1]`.
        offset: of any scale, `[n_rows, 1]`, or None.
        zero: of integers, how many scales the offset is, `[n_rows, 1]`, or None.
    """

    rows: SortedRows
    grid: Tensor
    no_clip: Tensor
    offset: Tensor | None = None
    zero: Tensor | None = None


def _place(rows: SortedRows, fmt: Format) -> _Placed:
    """A signed format is symmetric. An unsigned one begins at the smallest value.

    Unsigned integers begin at the nearest multiple of the scale that clips nothing, and at the same multiple of other
    scales: zero stays exact, and both ends are clipped alike.
    """
    grid = fmt.grid.to(rows.high.device)[None]
    if fmt.min < 0:
        no_clip = rows.magnitude / fmt.max
        if fmt.min == -fmt.max:
            return _Placed(rows.magnitudes, grid[:, grid[0] >= 0], no_clip)
        return _Placed(rows, grid, no_clip)
    low = rows.low.clamp(max=0)
    no_clip = (rows.high.clamp(min=0) - low).clamp(min=1e-12) / fmt.max
    if isinstance(fmt, IntFormat):
        zero = (low / no_clip).round()
        return _Placed(rows, grid + zero, no_clip, zero=zero)
    return _Placed(rows.heights, grid, no_clip, offset=low)


def representable_scales(rows: SortedRows, fmt: Format, scale_format: ScaleFormat) -> Tensor:
    """Every number of a scale format that the scale of a row may reasonably be, `[n_rows, n_candidates]`.

    They reach up to twice the smallest scale that clips nothing. Of a floating-point format, or of signed integers, no
    larger power-of-two multiple is better, for its grid within the range is part of that of half the scale.

    Args:
        rows: the values, all of one tensor.
        fmt: a signed format.
        scale_format: of the scales.
    """
    no_clip = rows.magnitude / fmt.max
    tensor_scale = scale_format.tensor_scale(2 * no_clip.amax())
    first = scale_format.floor(no_clip * CLIPS[0] / tensor_scale).int()  # half the memory of the candidates
    last = scale_format.floor(no_clip * 2 / tensor_scale).int()
    steps = torch.arange(int((last - first).amax()) + 1, device=first.device, dtype=first.dtype)
    return scale_format.decode(torch.minimum(first + steps, last)) * tensor_scale


def search_clip(
    rows: SortedRows, fmt: Format, max_only: bool = False, scale_format: ScaleFormat | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The clip of least squared error for each row, of any or of those that a scale format has.

    Args:
        rows: the values.
        fmt: the format.
        max_only: take the largest magnitude as the clip, or the least clip beyond that a scale format has (no search).
        scale_format: of the scales, None for float32.

    Returns:
        scale `[n_rows, 1]`, offset `[n_rows, 1]` or None, and the squared error `[n_rows, 1]`.
    """
    if scale_format is not None:
        scale = representable_scales(rows, fmt, scale_format)
        if max_only:
            clips = torch.where(scale * fmt.max >= rows.magnitude, scale, torch.inf)
            scale = clips.amin(1, keepdim=True)
        error, index = rows.squared_error(fmt, scale).min(dim=1, keepdim=True)
        return scale.gather(1, index), None, error
    placed = _place(rows, fmt)
    if max_only:
        scale = placed.no_clip
    else:
        scale = best_scales(placed.rows.values, placed.rows.sums, placed.grid, placed.no_clip)
    error, index = placed.rows.grid_errors(placed.grid, scale).min(dim=1, keepdim=True)
    scale = scale.gather(1, index)
    return scale, placed.offset if placed.zero is None else placed.zero * scale, error


def search_tensor_error(
    rows: Tensor, formats: Sequence[Format], max_only: bool = False, scale_format: ScaleFormat | None = None
) -> Quantizer:
    """Format (one for all rows) and clip (one for each row) of least squared error of the tensor itself.

    Args:
        rows: `[n_rows, n]`.
        formats: the candidates.
        max_only: no search of the clip.
        scale_format: of the scales, None for float32.
    """
    ordered = SortedRows(rows)
    found = [(fmt, *search_clip(ordered, fmt, max_only, scale_format)) for fmt in formats]
    fmt, scale, offset, _ = min(found, key=lambda f: f[3].sum().item())
    return Quantizer(fmt, scale, offset, scale_format=scale_format)


def search_output_error(
    rows: Tensor,
    formats: Sequence[Format],
    output_error: Callable[[Quantizer], Tensor],
    factors: Sequence[float] = (0.76, 0.82, 0.88, 0.94, 1.0, 1.06, 1.12),
    scale_format: ScaleFormat | None = None,
) -> Quantizer:
    """Format and clip of least error of the layer's output (the objective of LLM-FP4, Liu et al. 2023).

    The clips tried are multiples of the one of least tensor error, or those of the numbers next to its scale in a
    scale format.

    Args:
        rows: `[n_rows, n]`.
        formats: the candidates.
        output_error: squared error of the output for a quantizer, `[n]` where each n-th of the rows makes one output.
        factors: multiples of the tensor-error clip.
        scale_format: of the scales, None for float32.
    """
    ordered = SortedRows(rows)
    best: tuple[float, Quantizer] | None = None
    for fmt in formats:
        scale, offset, _ = search_clip(ordered, fmt, scale_format=scale_format)
        offsets = None
        if scale_format is not None:
            scales = _neighbours(scale, scale_format)
        else:
            scales = torch.stack([scale * factor for factor in factors])
            if offset is not None:
                offsets = torch.stack([offset * _offset_factor(fmt, factor) for factor in factors])
        trials = (Quantizer(fmt, s, None if offsets is None else offsets[i]) for i, s in enumerate(scales))
        errors = torch.stack([output_error(trial) for trial in trials])
        index = errors.argmin(dim=0)
        pick = index.repeat_interleave(len(rows) // len(index))[None, :, None]
        total = errors.gather(0, index[None]).sum().item()
        if best is None or total < best[0]:
            chosen = None if offsets is None else offsets.gather(0, pick)[0]
            best = total, Quantizer(fmt, scales.gather(0, pick)[0], chosen, scale_format=scale_format)
    assert best is not None, "no candidate formats"
    return best[1]


def _neighbours(scale: Tensor, scale_format: ScaleFormat) -> Tensor:
    """Scales of a format `[n_rows, 1]` and the numbers around each, `[n_shifts, n_rows, 1]`."""
    # Twice the largest leaves room for the number above it.
    tensor_scale = scale_format.tensor_scale(2 * scale.amax())
    low, high = scale_format.codes
    codes = scale_format.floor(scale / tensor_scale)
    shifts = [(codes + shift).clamp(low, high) for shift in scale_format.shifts]
    return torch.stack([scale_format.decode(shifted) * tensor_scale for shifted in shifts])


def _offset_factor(fmt: Format, factor: float) -> float:
    return factor if isinstance(fmt, IntFormat) else 1.0
