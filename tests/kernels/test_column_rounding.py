"""Kernels that round columns in turn, run by Triton's interpreter on the CPU, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from fpq_lightning.formats.numbers import parse_format
from fpq_lightning.kernels import ops


def operands(n: int, groups: int, offsets: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, a positive definite matrix for each group, scales and offsets."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(groups, 4 * n, n, generator=generator)
    weight = torch.randn(6, n, generator=generator)
    scale = torch.rand(6, n, generator=generator) * 0.2 + 0.1
    offset = torch.randn(6, n, generator=generator) * offsets
    return weight, x.mT @ x / n, scale, offset


@pytest.mark.parametrize(("n", "groups"), [(3, 1), (16, 1), (50, 1), (9, 2), (5, 6)])
@pytest.mark.parametrize("fmt", ["e2m1", "e1m2", "e3m0", "int4", "uint4", "float8_e4m3fn"])
def test_columns_are_rounded_as_in_plain_torch(fmt: str, n: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, scale, offset = operands(n, groups, fmt.startswith("u"))
    form = parse_format(fmt)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    start = form.quantize((weight - offset) / scale) * scale + offset
    gradient = ((weight - start).unflatten(0, (groups, -1)) @ hessian).flatten(0, 1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = []
    for kernels in ("0", "1"):
        monkeypatch.setenv("FPQ_KERNELS", kernels)
        found.append(
            (
                ops.descend_columns(start, gradient, hessian, scale, offset, form),
                *ops.compensate_columns(weight, factor, scale, offset, form),
            )
        )
    for plain, kernel in zip(*found, strict=True):
        # A value halfway between two of the grid may fall to either side, and moves what comes after it.
        assert (torch.isclose(plain, kernel, rtol=1e-4, atol=1e-5).all(1)).float().mean() >= 0.8
