"""Low-bit weights with operands of half precision: what is saved is memory traffic."""

from __future__ import annotations

import torch
from torch import Tensor

from fpq_lightning.kernels import ops
from fpq_lightning.kernels.availability import kernels_run_for
from fpq_lightning.nn.backends.paths import PATHS, ArithmeticPath
from fpq_lightning.nn.operands import Operands

WIDTH = 4
"""Bits of the codes that are decoded within a product; with six and eight that gains nothing (docs/benchmarks.md)."""
MAX_ROWS = 64
"""Rows of the input up to which it is done."""


def fits(operands: Operands) -> bool:
    """Whether the products of a layer can decode its weight as they go."""
    return (
        operands.convolution is None
        and bool(operands.weights)
        and all(w.format.bits == WIDTH and w.offset is None and w.scale.shape[1] == 1 for w in operands.weights)
    )


def run(x: Tensor, operands: Operands) -> Tensor:
    """A layer on few rows `x`, float16 or bfloat16 `[..., in]`; a product for each part of the input, summed."""
    rows = operands.quantize_input(x).reshape(-1, x.shape[-1])
    bias = operands.bias
    total: Tensor | None = None
    for weight, part in zip(operands.weights, rows.split(operands.splits, dim=1), strict=True):
        out = ops.weight_gemm(part.contiguous(), weight.bytes, weight.format, weight.scale, bias)
        total, bias = out if total is None else total + out, None
    return total.reshape(*x.shape[:-1], operands.outputs)  # type: ignore[union-attr]


PATHS.register(
    ArithmeticPath(
        name="weight_only",
        help="codes are decoded within the product, for inputs of few rows",
        rank=0,
        fits=fits,
        available=lambda hardware, dtype: hardware.kernels and dtype in (torch.float16, torch.bfloat16),
        run=run,
        takes=kernels_run_for,  # which are for the current device
        max_rows=MAX_ROWS,
    )
)
