"""Products of few rows with a weight in signed four-bit floating point, on Hopper's tensor cores.

The weight is the left factor, the transpose of x the right one: ``wgmma`` takes 64 output channels at a time from
registers, where the codes become bfloat16, and the few rows from shared memory. The codes never lie decoded in memory.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fpq_lightning.formats.numbers import Format
from fpq_lightning.kernels.codes import constants, four_bit_assembly

if TYPE_CHECKING:
    from fpq_lightning.kernels.cuda import CudaKernel

MAX_ROWS = 64
"""Rows of x that the kernel takes."""
CHUNK = 128
"""Input channels of a step."""
ARCHITECTURE = "sm_90a"


class Tiling(NamedTuple):
    """How a product is cut.

    Attributes:
        groups: groups of four warps in a block of threads; each has 64 output channels.
        splits: blocks that share the input channels of their outputs, a cluster: at most 8, and one chunk at least.
        stages: chunks of codes on their way from memory.
    """

    groups: int
    splits: int
    stages: int

    @property
    def outputs(self) -> int:
        """Output channels of a block."""
        return 64 * self.groups

    def shared_bytes(self, columns: int) -> int:
        """Codes, three chunks of x, and the partial sums that a block of a cluster adds."""
        blocks = self.outputs // 16 * columns // 8
        sums = -(-blocks // self.splits) * self.splits * 512 if self.splits > 1 else 0
        return self.stages * self.outputs * CHUNK // 2 + 3 * columns * CHUNK * 2 + sums


def tiling_for(n: int, k: int, m: int) -> Tiling:
    """A tiling by size, chosen for the 132 multiprocessors of an H100 or H200, by comparison of about ten a size.

    A single row is fastest in many small blocks, of which some wait for memory while others decode. More rows have to
    be brought into order by each block: fewer and larger ones do, as long as they occupy most multiprocessors once.

    Args:
        n: output channels.
        k: input channels, a multiple of 128.
        m: rows, at most 64.
    """
    chunks = k // CHUNK
    most = min(8, chunks)
    if m <= 8:
        splits = min(most, max(1, round(420 / -(-n // 64))))
        return Tiling(1, splits, min(6, -(-chunks // splits)))
    tall = -(-n // 192)
    # Larger clusters of such blocks, of which a multiprocessor has one, do not all find a place at once.
    if 128 // tall in (1, 2) and 128 // tall * tall >= 96:
        groups, splits = 3, min(most, 128 // tall)
    else:
        groups, splits = 2, min(most, max(1, 192 // -(-n // 128)))
    each = -(-chunks // splits)
    return Tiling(groups, splits, min(4, each if m <= 16 else -(-each // 2)))


def fits(x: Tensor, codes: Tensor, fmt: Format, bias: Tensor | None) -> bool:
    """Whether the kernel takes operands of these types, sizes and places; see `skinny_gemm`."""
    return (
        x.dtype == torch.bfloat16
        and 1 <= x.shape[0] <= MAX_ROWS
        and x.shape[1] % CHUNK == 0
        and codes.shape[0] % 16 == 0
        and (bias is None or bias.dtype == torch.bfloat16)
        and _has_values(fmt)
        and all(t is None or t.data_ptr() % 16 == 0 for t in (x, codes, bias))
    )


@cache
def _has_values(fmt: Format) -> bool:
    """Whether codes are four bits of sign and magnitude."""
    return bool(four_bit_assembly(fmt))


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def works(fmt: Format, device: torch.device) -> bool:
    """Whether the kernel can be built for a device, the current one, and gives the values of all codes of a format.

    Warns if not, except where it is not meant to: on other GPUs, and without the package ``cuda.bindings``.
    """
    if not _is_hopper(device):
        return False
    n = torch.arange(16, device=device)[:, None]
    codes = (n + torch.arange(CHUNK, device=device)).remainder(16).to(torch.uint8)
    one, scale = torch.eye(CHUNK, dtype=torch.bfloat16, device=device)[:MAX_ROWS], torch.ones(1, 1, device=device)
    try:
        values = skinny_gemm(one, codes[:, 0::2] | codes[:, 1::2] << 4, fmt, scale, None)
        if torch.equal(values.T.float().cpu(), fmt.values[codes[:, :MAX_ROWS].long().cpu()]):
            return True
        reason = "it gives other values"
    except ModuleNotFoundError:
        return False
    except Exception as error:  # whatever a compiler or driver may raise
        reason = " ".join(str(error).split())[:150]
    warnings.warn(f"the CUDA kernel of few rows cannot be used here ({reason}): Triton's is slower", stacklevel=2)
    return False


def skinny_gemm(
    x: Tensor, codes: Tensor, fmt: Format, scale: Tensor, bias: Tensor | None, tiling: Tiling | None = None
) -> Tensor:
    """``x @ weight.T + bias`` with the weight in packed codes; products of exact values, summed in float32.

    All operands are contiguous and lie on the current device; all but `scale` begin at multiples of 16 bytes.

    Args:
        x: bfloat16 `[m, in]`, at most 64 rows; `in` a multiple of 128.
        codes: uint8 `[out, in / 2]`, the code of an even channel in the lower half of a byte; `out` a multiple of 16.
        fmt: signed floating point in four bits, without reserved codes.
        scale: float32 `[1, 1]` or `[out, 1]`.
        bias: bfloat16 `[out]`, or None.
        tiling: how it is cut; by size if None.

    Returns:
        bfloat16 `[m, out]`.

    Raises:
        ModuleNotFoundError: without the package ``cuda.bindings``.
        RuntimeError: if the kernel cannot be built or started.
    """
    (m, k), n = x.shape, codes.shape[0]
    columns = 1 << max(3, (m - 1).bit_length())
    kernel, blocks, threads = _variant(n, k, columns, fmt, x.get_device(), tiling)
    out = x.new_empty(m, n)
    kernel(blocks, threads, x, codes, scale, bias, out, int(scale.shape[0] > 1), m, n, k)
    return out


@cache
def _variant(
    n: int, k: int, columns: int, fmt: Format, device: int, tiling: Tiling | None
) -> tuple[CudaKernel, int, int]:
    """The kernel for a size, how many blocks of it, and the threads of one."""
    cut = tiling_for(n, k, columns) if tiling is None else tiling
    return _kernel(cut, columns, fmt, device), -(-n // cut.outputs) * cut.splits, 128 * cut.groups


@cache
def _kernel(tiling: Tiling, columns: int, fmt: Format, device: int) -> CudaKernel:
    from fpq_lightning.kernels.cuda import CudaKernel  # needs cuda.bindings

    return CudaKernel(source(tiling, columns, fmt), "skinny_gemm", ARCHITECTURE, tiling.shared_bytes(columns))


def source(tiling: Tiling, columns: int, fmt: Format) -> str:
    """The CUDA text of a variant.

    Args:
        tiling: how the product is cut.
        columns: rows of x that it has room for: 8, 16, 32 or 64.
        fmt: of the codes.
    """
    values = constants(fmt)
    multiplier = int(torch.tensor(values["MULTIPLIER"], dtype=torch.bfloat16).view(torch.int16))
    defines = {
        "GROUPS": tiling.groups,
        "SPLITS": tiling.splits,
        "STAGES": tiling.stages,
        "COLUMNS": columns,
        "MANTISSA": values["MANTISSA"],
        "MULTIPLIER": f"{multiplier * 0x10001:#x}u",
        "CLUSTER": f"__cluster_dims__({tiling.splits}, 1, 1)" if tiling.splits > 1 else "",
    }
    lines = [*(f"#define {name} {value}" for name, value in defines.items()), _multiply(columns)]
    return "\n".join([*lines, Path(__file__).with_name("skinny_gemm.cu").read_text()])


def _multiply(columns: int) -> str:
    """CUDA C++ of the tensor cores' instruction, which has an operand for each sum of a lane."""
    n = columns // 2
    names = ", ".join(f"%{i}" for i in range(n))
    return f"""
__device__ void multiply(float* sums, const unsigned* weight, unsigned long long x) {{
    asm volatile("{{.reg .pred add; setp.eq.u32 add, 0, 0;"
        "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{names}}},"
        "{{%{n}, %{n + 1}, %{n + 2}, %{n + 3}}}, %{n + 4}, add, 1, 1, 0;}}"
        : {", ".join(f'"+f"(sums[{i}])' for i in range(n))}
        : "r"(weight[0]), "r"(weight[1]), "r"(weight[2]), "r"(weight[3]), "l"(x));
}}
"""
