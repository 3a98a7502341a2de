"""What Triton makes of kernels for GPUs of every generation; none is needed for that."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

PRODUCTS = {  # the instruction of products, and the shared memory that a program can have, by compute capability
    80: ("mma.sync", 163),
    89: ("mma.sync", 99),
    90: ("wgmma", 227),
    100: ("tcgen05.mma", 227),
    120: ("mma.sync", 99),
}
COMPILE = """
import json, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fpq_lightning.formats.numbers import parse_format
from fpq_lightning.kernels import codes, conv, weight_gemm

def of_conv(*size):
    cut = conv.tiling_for(*size)
    types = {
        "x_desc": f"tensordesc<fp8e4nv[1,{cut.height},1,{cut.width},{cut.inputs}]>",
        "weight_desc": f"tensordesc<fp8e4nv[{cut.outputs},{cut.inputs}]>", "scale_ptr": "*fp32", "factor_ptr": "*fp32",
        "bias_ptr": "*bf16", "out_ptr": "*bf16",
        **dict.fromkeys(["scale_stride", "height", "width", "n_out", "tiles_down", "tiles_across"], "i32"),
    }
    values = {
        "C": 256, "TAPS": 9, "TAPS_ACROSS": 3, "STRIDE": 1, "PAD_DOWN": 1, "PAD_ACROSS": 1, "HAS_BIAS": True,
        "CHANNELS_LAST": True,
        "BLOCK_H": cut.height, "BLOCK_W": cut.width, "BLOCK_N": cut.outputs, "BLOCK_C": cut.inputs,
    }
    return conv._conv, cut, types, values

def of_weight_gemm(rows):
    cut = weight_gemm.tiling_for(256, 256)
    types = {
        "x_ptr": "*fp16", "codes_ptr": "*u8", "scale_ptr": "*fp32", "bias_ptr": "*fp16", "out_ptr": "*fp16",
        "partial_ptr": "*fp32", "arrived_ptr": "*i32",
        **dict.fromkeys(["n_rows", "n_out", "row_bytes", "scale_stride"], "i32"),
    }
    values = {
        "K": 256, "HAS_BIAS": True, **codes.constants(parse_format("e2m1")), "SPLITS": cut.splits,
        "BLOCK_M": rows, "BLOCK_N": cut.outputs, "BLOCK_K": cut.inputs, "ASSEMBLY": "",
    }
    return weight_gemm._gemm, cut, types, values

for name, size, capabilities in json.loads(sys.argv[1]):
    kernel, cut, types, values = {"conv": of_conv, "weight_gemm": of_weight_gemm}[name](*size)
    types |= dict.fromkeys(values, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    for capability in capabilities:
        options = {"num_warps": cut.warps, "num_stages": cut.stages}
        built = compile(ASTSource(kernel, types, values), target=GPUTarget("cuda", capability, 32), options=options)
        print(json.dumps([name, capability, built.metadata.shared, built.asm["ttgir"], built.asm["ptx"]]))
"""
KERNELS = [
    ("conv", (32, 32, 256, 128), [90, 100, 120]),  # height, width, input and output channels
    ("conv", (64, 64, 256, 128), [90, 100, 120]),
    ("conv", (128, 128, 320, 320), [90, 100, 120]),
    ("conv", (16, 16, 96, 48), [90, 100, 120]),
    ("weight_gemm", (16,), [80, 89, 90, 100, 120]),  # rows
    ("weight_gemm", (64,), [80, 89, 90, 100, 120]),
]


def test_kernels_are_built_for_every_generation() -> None:
    program = [sys.executable, "-c", COMPILE, json.dumps(KERNELS)]
    outcome = subprocess.run(program, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    built = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert len(built) == sum(len(capabilities) for *_, capabilities in KERNELS)
    for kernel, capability, shared, intermediate, assembly in built:
        instruction, memory = PRODUCTS[capability]
        if kernel == "weight_gemm":
            instruction = "mma.sync"
        assert instruction in assembly
        assert shared <= memory * 1024
        # Triton fills registers again that asynchronous products still read: sums are wrong, now and then.
        for operands in re.findall(r"warp_group_dot .*? : (\S+)<.*?> \* (\S+)<", intermediate):
            assert operands == ("!ttg.memdesc", "!ttg.memdesc")
        assert ("warp_group_dot " in intermediate) == (instruction == "wgmma")
