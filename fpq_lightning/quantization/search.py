"""Search of format and clip.

The candidates are those of Kuzmin et al. 2022: clips in ``linspace(0.1, 1.2, 111) * max|x|`` for every format. The
squared error of one candidate follows from the sorted values and their prefix sums (between two neighbouring
decision thresholds every value goes to the same grid point), so a candidate costs a few binary searches instead of
a pass over the tensor, and all of them can be tried: the error is too ragged in the clip to go coarse to fine.
Where scales have a format of their own, the candidates are all of its numbers in that range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fpq_lightning.formats.numbers import Format, IntFormat
from fpq_lightning.formats.scales import ScaleFormat
from fpq_lightning.quantization.quantizer import Quantizer

CLIPS = torch.linspace(0.1, 1.2, 111)
_CHUNK = 2**24  # thresholds looked up at once; bounds memory to a few hundred MB


class SortedRows:
    """Rows sorted once, for the squared error of any number of quantizers.

    Args:
        rows: finite values `[n_rows, n]`.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self.values = _sorted(rows.float())
        zero = torch.zeros(len(rows), 1, dtype=torch.float64, device=rows.device)
        double = self.values.double()
        self._sum = torch.cat([zero, double.cumsum(1)], 1)
        self._energy = double.square().sum(1, keepdim=True)

    @cached_property
    def _magnitudes(self) -> SortedRows:
        return SortedRows(self._rows.abs())

    @property
    def magnitude(self) -> Tensor:
        """The largest magnitude of each row, `[n_rows, 1]`."""
        return torch.maximum(self.values[:, -1:].abs(), self.values[:, :1].abs()).clamp(min=1e-12)

    def squared_error(self, fmt: Format, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """Sum of squared quantization errors.

        Args:
            fmt: the format.
            scale: `[n_rows, n_candidates]`.
            offset: `[n_rows, n_candidates]` or None.

        Returns:
            float64 `[n_rows, n_candidates]`.
        """
        grid = fmt.grid.to(scale.device)
        if offset is None and fmt.min == -fmt.max:  # a symmetric grid sees magnitudes only
            return self._magnitudes._errors(grid[grid >= 0], scale, None)
        return self._errors(grid, scale, offset)

    def _errors(self, grid: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        rows_at_once = max(1, _CHUNK // len(grid))
        at_once = max(1, _CHUNK // (len(grid) * min(len(scale), rows_at_once)))
        parts = []
        for rows in torch.arange(len(scale)).split(rows_at_once):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            scales = scale[part].split(at_once, 1)
            offsets = [None] * len(scales) if offset is None else offset[part].split(at_once, 1)
            found = [self._squared_error(grid, part, s, o) for s, o in zip(scales, offsets, strict=True)]
            parts.append(torch.cat(found, 1))
        return torch.cat(parts)

    def _squared_error(self, grid: Tensor, part: slice, scale: Tensor, offset: Tensor | None) -> Tensor:
        rows, candidates = scale.shape
        values, total = self.values[part], self._sum[part]
        shift = 0.0 if offset is None else offset.double()[..., None]
        points = scale.double()[..., None] * grid.double() + shift
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


def candidate_scales(rows: SortedRows, fmt: Format, fractions: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and offset of clips that are fractions of the largest magnitude (of the range for unsigned formats).

    Args:
        rows: the values.
        fmt: the format. A signed one is symmetric; an unsigned one starts at the smallest value, or for integers at
            the nearest multiple of the scale, so that zero stays exact.
        fractions: `[n_rows or 1, n_candidates]`.
    """
    if fmt.min < 0:
        return rows.magnitude * fractions / fmt.max, None
    low = rows.values[:, :1].clamp(max=0.0)
    high = rows.values[:, -1:].clamp(min=0.0)
    scale = (high - low).clamp(min=1e-12) * fractions / fmt.max
    if isinstance(fmt, IntFormat):
        # An integer format clips both ends alike.
        return scale, (low * fractions / scale).round() * scale
    return scale, low.expand_as(scale)


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
    """The clip of least squared error for each row, among `CLIPS` or those that a scale format has.

    Args:
        rows: the values.
        fmt: the format.
        max_only: take the largest magnitude as the clip, or the least clip beyond that a scale format has (no search).
        scale_format: of the scales, None for float32.

    Returns:
        scale `[n_rows, 1]`, offset `[n_rows, 1]` or None, and the squared error `[n_rows, 1]`.
    """
    offset = None
    if scale_format is not None:
        scale = representable_scales(rows, fmt, scale_format)
        if max_only:
            clips = torch.where(scale * fmt.max >= rows.magnitude, scale, torch.inf)
            scale = clips.amin(1, keepdim=True)
    else:
        fractions = torch.ones(1, 1) if max_only else CLIPS[None]
        scale, offset = candidate_scales(rows, fmt, fractions.to(rows.values.device))
    error, index = rows.squared_error(fmt, scale, offset).min(dim=1, keepdim=True)
    return scale.gather(1, index), None if offset is None else offset.gather(1, index), error


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
