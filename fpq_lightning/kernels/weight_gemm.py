"""Products of few rows with a weight in four-bit codes, which are decoded inside: read once and never written.

With few rows a product could take as long as reading the weight, a quarter of the time that sixteen bits take. How far
it is from that is in docs/benchmarks.md. Hopper has a kernel in CUDA C++ (`skinny_gemm`); here is Triton's, for all
sizes, types and formats of four bits.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpq_lightning.formats.numbers import Format
from fpq_lightning.kernels import skinny_gemm
from fpq_lightning.kernels.codes import constants, four_bit_assembly, value_of


class Tiling(NamedTuple):
    """How a product is cut.

    Attributes:
        outputs: output channels of a program.
        inputs: input channels of a step.
        splits: programs that share the input channels of an output.
        warps: of a program.
        stages: of its pipeline.
    """

    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int


@triton.jit
def _weight_tile(
    codes_ptr, rows, start, n_out, row_bytes, WIDTH: tl.constexpr, MANTISSA: tl.constexpr,
    SIGNED: tl.constexpr, MULTIPLIER: tl.constexpr, BLOCK_K: tl.constexpr, ASSEMBLY: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Values `[rows, BLOCK_K]` of input channels from `start`, a multiple of BLOCK_K; code zero beyond the weight."""
    place = start // 2 + tl.arange(0, BLOCK_K // 2)
    inside = (rows[:, None] < n_out) & (place[None, :] < row_bytes)
    pairs = tl.load(codes_ptr + rows[:, None].to(tl.int64) * row_bytes + place[None, :], mask=inside, other=0)
    if ASSEMBLY != "":
        low, high = tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r", [pairs], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        low = value_of((pairs & 15).to(tl.int32), WIDTH, MANTISSA, SIGNED, MULTIPLIER).to(DTYPE)
        high = value_of((pairs >> 4).to(tl.int32), WIDTH, MANTISSA, SIGNED, MULTIPLIER).to(DTYPE)
    return tl.reshape(tl.join(low, high), (rows.shape[0], BLOCK_K))


@triton.jit
def _gemm(
    x_ptr, codes_ptr, scale_ptr, bias_ptr, out_ptr, partial_ptr, arrived_ptr, n_rows, n_out, row_bytes, scale_stride,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr, MANTISSA: tl.constexpr, SIGNED: tl.constexpr,
    MULTIPLIER: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    outs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(0, K, SPLITS * BLOCK_K):
        start = step + split * BLOCK_K
        weight = _weight_tile(
            codes_ptr, outs, start, n_out, row_bytes, WIDTH, MANTISSA, SIGNED, MULTIPLIER, BLOCK_K, ASSEMBLY,
            x_ptr.dtype.element_ty,
        )  # fmt: skip
        column = start + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < n_rows) & (column[None, :] < K)
        x = tl.load(x_ptr + rows[:, None] * K + column[None, :], mask=inside, other=0.0)
        total = tl.dot(weight, tl.trans(x), total)  # x is zero beyond K
    inside = (outs[:, None] < n_out) & (rows[None, :] < n_rows)
    at = rows[None, :] * n_out + outs[:, None]
    last = True
    if SPLITS > 1:
        tl.store(partial_ptr + split * n_rows * n_out + at, total, mask=inside)
        tl.debug_barrier()  # all of the program has stored before it says so
        last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        if SPLITS > 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for other in range(SPLITS):  # in one order, whoever comes last
                total += tl.load(partial_ptr + other * n_rows * n_out + at, mask=inside, cache_modifier=".cg")
        total = total * tl.load(scale_ptr + outs * scale_stride, mask=outs < n_out, other=0.0)[:, None]
        if HAS_BIAS:
            total += tl.load(bias_ptr + outs, mask=outs < n_out, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def tiling_for(n_out: int, n_in: int) -> Tiling:
    """A tiling by size; others have not been compared yet (``benchmarks/arithmetic.py tilings``).

    32 outputs are no tile for Hopper's asynchronous products, for which Triton 3.6 to 3.9 would fill the registers of
    the decoded weight again before they are read (see `conv`).
    """
    return Tiling(outputs=32, inputs=128, splits=2 if n_out * n_in < 2**25 else 1, warps=4, stages=4)


@lru_cache(maxsize=16)
def _assembly(fmt: Format, device: torch.device) -> str:
    """The assembly of a format, once it has given the values of all codes on a device; empty without."""
    assembly = four_bit_assembly(fmt)
    if not assembly:
        return ""
    codes = torch.arange(16, dtype=torch.uint8, device=device)
    pairs = (codes[0::2] | codes[1::2] << 4)[None]
    one, scale = torch.eye(16, dtype=torch.bfloat16, device=device), torch.ones(1, 1, device=device)
    try:
        values = _launch(one, pairs, fmt, scale, None, Tiling(16, 32, 1, 4, 2), assembly)
        if torch.equal(values[:, 0].float().cpu(), fmt.values):
            return assembly
        reason = "they give other values"
    except Exception as error:  # whatever a compiler may raise
        reason = " ".join(str(error).split())[:150]
    warnings.warn(f"byte permutations cannot be used here ({reason}): four bits are unpacked slower", stacklevel=2)
    return ""


def weight_gemm(
    x: Tensor, codes: Tensor, fmt: Format, scale: Tensor, bias: Tensor | None, tiling: Tiling | None = None
) -> Tensor:
    """``x @ weight.T + bias`` with the weight in packed codes; products of exact values, summed in float32.

    Args:
        x: float16 or bfloat16 `[m, in]`, contiguous; all rows lie in one tile, so few.
        codes: uint8 `[out, bytes]`, packed rows.
        fmt: the number format, of four bits.
        scale: float32 `[1, 1]` or `[out, 1]`.
        bias: `[out]`, or None.
        tiling: how Triton's kernel, which is taken then, cuts it; if None, the kernel and how are chosen here.

    Returns:
        `[m, out]` of the type of `x`.
    """
    if tiling is None and skinny_gemm.fits(x, codes, fmt, bias) and skinny_gemm.works(fmt, x.device):
        return skinny_gemm.skinny_gemm(x, codes, fmt, scale, bias)
    cut = tiling_for(codes.shape[0], x.shape[1]) if tiling is None else tiling
    assembly = _assembly(fmt, x.device) if x.is_cuda and x.dtype == torch.bfloat16 else ""
    return _launch(x, codes, fmt, scale, bias, cut, assembly)


def _launch(
    x: Tensor, codes: Tensor, fmt: Format, scale: Tensor, bias: Tensor | None, cut: Tiling, assembly: str
) -> Tensor:
    (m, k), n = x.shape, codes.shape[0]
    n_tiles = triton.cdiv(n, cut.outputs)
    out = x.new_empty(m, n)
    arrived = partial = codes  # not looked at without splits
    if cut.splits > 1:
        partial = torch.empty(cut.splits, m, n, device=x.device)
        # Zeroed for each call: a counter that is kept would tie calls on several streams together.
        arrived = torch.zeros(n_tiles, dtype=torch.int32, device=x.device)
    _gemm[(n_tiles, cut.splits)](
        x, codes, scale, out if bias is None else bias, out, partial, arrived, m, n, codes.shape[1],
        1 if scale.shape[0] > 1 else 0, K=k, HAS_BIAS=bias is not None, **constants(fmt), SPLITS=cut.splits,
        BLOCK_M=max(16, triton.next_power_of_2(m)), BLOCK_N=cut.outputs, BLOCK_K=cut.inputs, num_warps=cut.warps,
        ASSEMBLY=assembly, num_stages=cut.stages,
    )  # fmt: skip
    return out
