"""What Triton makes of kernels for a Hopper GPU; none is needed for that."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fpq_lightning.formats import parse_format
from fpq_lightning.kernels import codes, conv, weight_gemm

def intermediate(kernel, types, values, warps, stages):
    types |= dict.fromkeys(values, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    options = {"num_warps": warps, "num_stages": stages}
    return compile(ASTSource(kernel, types, values), target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"]

if sys.argv[1] == "conv":
    cut = conv.tiling_for(32, 32, 256, 128)
    types = {
        "x_desc": f"tensordesc<fp8e4nv[1,{cut.height},1,{cut.width},{cut.inputs}]>",
        "weight_desc": f"tensordesc<fp8e4nv[{cut.outputs},{cut.inputs}]>", "scale_ptr": "*fp32", "factor_ptr": "*fp32",
        "bias_ptr": "*bf16", "out_ptr": "*bf16",
        **dict.fromkeys(["scale_stride", "height", "width", "n_out", "tiles_down", "tiles_across"], "i32"),
    }
    values = {
        "C": 256, "TAPS": 9, "TAPS_ACROSS": 3, "STRIDE": 1, "PAD_DOWN": 1, "PAD_ACROSS": 1, "HAS_BIAS": True,
        "BLOCK_H": cut.height, "BLOCK_W": cut.width, "BLOCK_N": cut.outputs, "BLOCK_C": cut.inputs,
    }
    kernel = conv._conv
else:
    cut = weight_gemm.tiling_for(256, 256)
    types = {
        "x_ptr": "*fp16", "codes_ptr": "*u8", "scale_ptr": "*fp32", "bias_ptr": "*fp16", "out_ptr": "*fp16",
        "partial_ptr": "*fp32", "arrived_ptr": "*i32",
        **dict.fromkeys(["n_rows", "n_out", "row_bytes", "scale_stride"], "i32"),
    }
    values = {
        "K": 256, "HAS_BIAS": True, **codes.constants(parse_format("e2m1")), "SPLITS": cut.splits, "BLOCK_M": 64,
        "BLOCK_N": cut.outputs, "BLOCK_K": cut.inputs, "ASSEMBLY": "",
    }
    kernel = weight_gemm._gemm
print(intermediate(kernel, types, values, cut.warps, cut.stages))
"""


@pytest.mark.parametrize("kernel", ["conv", "weight_gemm"])
def test_no_asynchronous_product_has_an_operand_in_registers(kernel: str) -> None:
    """Triton fills such registers again while tensor cores read them: sums are wrong, now and then."""
    outcome = subprocess.run([sys.executable, "-c", COMPILE, kernel], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    products = re.findall(r"(warp_group_dot|tt\.dot) .*? : (\S+)<.*?> \* (\S+)<", outcome.stdout)
    assert products
    for product, *operands in products:
        assert product == "tt.dot" or operands == ["!ttg.memdesc", "!ttg.memdesc"]
