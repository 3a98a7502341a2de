"""What the kernels compute, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fpq_lightning.formats.numbers import Format, parse_format
from fpq_lightning.formats.packing import unpack
from fpq_lightning.utils.device_cache import cached_tensor

E4M3 = parse_format("float8_e4m3fn")

GAMMA, ZETA = -0.1, 1.1
"""The stretch of the rectified sigmoid (Louizos et al. 2018): h reaches 0 and 1 at finite V."""


# --- packed codes --------------------------------------------------------------------------------------------------


@cached_tensor
def code_values(fmt: str, device: torch.device) -> Tensor:
    """The value of every code of a format, float32 `[2^bits]`."""
    return parse_format(fmt).values.to(device)


@cached_tensor
def e4m3_codes(fmt: str, device: torch.device) -> Tensor:
    """The E4M3 code of the value of every code of a format, uint8 `[2^bits]`."""
    return E4M3.encode(parse_format(fmt).values.nan_to_num()).to(device)


def decode(
    codes: Tensor, fmt: Format, shape: Sequence[int], scale: Tensor, offset: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """A weight from its packed codes; arguments as in `fpq_lightning.kernels.decode.decode`."""
    indices = unpack(codes, fmt.bits, math.prod(shape[1:])).flatten().int()
    return apply_scales(code_values(fmt.name, codes.device).index_select(0, indices), shape, scale, offset, dtype)


def apply_scales(
    values: Tensor, shape: Sequence[int], scale: Tensor, offset: Tensor | None, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """Values times scales plus offsets, computed in float32 and rounded to a type."""
    weight = values.reshape(shape[0], scale.shape[1], -1) * scale[..., None]
    if offset is not None:
        weight = weight + offset[..., None]
    return weight.reshape(tuple(shape)).to(dtype)


def translate(codes: Tensor, width: int, table: Tensor | None, n: int, taps: int) -> Tensor:
    """Packed codes of one format to those of another; as in `fpq_lightning.kernels.decode.translate`."""
    found = unpack(codes, width, n * taps)
    found = found if table is None else table[found.int()]
    return found.reshape(len(codes), n, taps).transpose(1, 2).reshape(len(codes), -1)


# --- activations ---------------------------------------------------------------------------------------------------


def round_to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """E4M3 values nearest to ``x * (1 / scale)``, saturating; float8_e4m3fn of the shape of `x`, contiguous."""
    y = x.float() * (1 / scale)  # as the kernel does
    if torch.compiler.is_compiling():  # a clamp, NaN included, in fewer instructions than compilers make of one
        y = torch.where(y.abs() > E4M3.max, torch.where(y > 0, E4M3.max, -E4M3.max), y)
    else:
        y = y.clamp(-E4M3.max, E4M3.max)
    return y.to(torch.float8_e4m3fn).contiguous()


class _StraightThrough(torch.autograd.Function):
    """Rounding to the grid whose gradient is one inside the range and zero outside."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, fmt: Format) -> Tensor:  # type: ignore[override]
        if y.requires_grad:
            ctx.save_for_backward((y >= fmt.min) & (y <= fmt.max))
        return fmt.quantize(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return gradient * inside, None


def fake_quantize(x: Tensor, scale: Tensor, offset: Tensor | None, fmt: Format) -> Tensor:
    """Quantizes and dequantizes; arguments as in `fpq_lightning.kernels.ops.fake_quantize`."""
    y = x.float()
    if offset is not None:
        y = y - offset
    value = _StraightThrough.apply(y / scale, fmt) * scale
    return (value if offset is None else value + offset).to(x.dtype)


# --- learned rounding ----------------------------------------------------------------------------------------------


def rectified_sigmoid(v: Tensor, sensitivity: Tensor | None) -> Tensor:
    """``h(V) = clamp((zeta - gamma) sigmoid(V) + gamma, 0, 1)`` (AdaRound, eq. 23), of V / sensitivity if given."""
    v = v if sensitivity is None else v / sensitivity
    return torch.clamp((ZETA - GAMMA) * torch.sigmoid(v) + GAMMA, 0, 1)


def rounded_weight(
    v: Tensor, scale: Tensor, base: Tensor, step: Tensor, offset: Tensor | None, hardness: Tensor | float,
    low: float, high: float, sensitivity: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows of a weight whose rounding is learned; arguments as in `fpq_lightning.kernels.ops.rounded_weight`."""
    h = rectified_sigmoid(v, sensitivity)
    up = h + hardness * ((v >= 0).float() - h).detach()
    value = ((base + up) * step).clamp(low, high) * scale
    return value if offset is None else value + offset


def rounding_regulariser(h: Tensor, beta: Tensor | float) -> Tensor:
    """Mean of ``1 - |2h - 1|^beta`` (AdaRound, equation 24): zero once every h is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).mean()


# --- rounding of columns -------------------------------------------------------------------------------------------


def descend_columns(q: Tensor, gradient: Tensor, hessian: Tensor, scale: Tensor, offset: Tensor, fmt: Format) -> Tensor:
    """Columns rounded in turn, each given all others; arguments as in `fpq_lightning.kernels.ops.descend_columns`."""
    columns, left, scale, offset = (_columns(x, hessian) for x in (q, gradient, scale, offset))
    rows = hessian[..., None]
    for j in range(hessian.shape[1]):
        value = _nearest(columns[:, j] + left[:, j] / rows[:, j, j], scale[:, j], offset[:, j], fmt)
        left -= (value - columns[:, j])[:, None] * rows[:, j]
        columns[:, j] = value
    return columns.mT.flatten(0, 1)


def compensate_columns(
    left: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, fmt: Format
) -> tuple[Tensor, Tensor]:
    """Columns rounded in turn, the later ones making up for errors; as in `kernels.ops.compensate_columns`."""
    left, scale, offset = (_columns(x, factor) for x in (left, scale, offset))
    q, errors, rows = torch.empty_like(left), torch.empty_like(left), factor[..., None]
    for j in range(factor.shape[1]):
        q[:, j] = _nearest(left[:, j], scale[:, j], offset[:, j], fmt)
        errors[:, j] = (left[:, j] - q[:, j]) / rows[:, j, j]
        left[:, j + 1 :] -= errors[:, j, None] * rows[:, j, j + 1 :]
    return q.mT.flatten(0, 1), errors.mT.flatten(0, 1)


def _columns(rows: Tensor, matrices: Tensor) -> Tensor:
    """Rows `[out, n]` as the columns of each group, `[groups, n, out / groups]`, a copy in which a column is dense."""
    return rows.unflatten(0, (len(matrices), -1)).mT.clone(memory_format=torch.contiguous_format)


def _nearest(values: Tensor, scale: Tensor, offset: Tensor, fmt: Format) -> Tensor:
    """The nearest values of a grid; which of two that are equally near does not matter here, unlike speed."""
    grid, between = _grid(fmt.name, values.device)
    return grid[torch.bucketize((values - offset) / scale, between)] * scale + offset


@lru_cache(maxsize=64)
def _grid(fmt: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The values of a format, and what lies halfway between each two of them."""
    grid = parse_format(fmt).grid.to(device)
    return grid, (grid[1:] + grid[:-1]) / 2
