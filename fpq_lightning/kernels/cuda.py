"""CUDA C++ kernels, built at run time by the compiler that PyTorch brings along (NVRTC)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from cuda.bindings import driver, nvrtc
from torch import Tensor


class CudaKernel:
    """A kernel, built for and loaded on the current device.

    Args:
        source: CUDA C++, which includes nothing.
        name: of an ``extern "C"`` kernel in it.
        architecture: such as ``sm_90a``.
        shared_bytes: shared memory that a block gets at its start.

    Raises:
        RuntimeError: if it cannot be built, or the device does not take it.
    """

    def __init__(self, source: str, name: str, architecture: str, shared_bytes: int) -> None:
        self.shared_bytes = shared_bytes
        self.module = _checked(driver.cuModuleLoadData(_build(source, name, architecture)))
        self.function = _checked(driver.cuModuleGetFunction(self.module, name.encode()))
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self.function, most, shared_bytes))

    def __call__(self, blocks: int, threads: int, *arguments: Tensor | int | None) -> None:
        """Starts it on the current stream.

        Args:
            blocks: of threads, in one row.
            threads: of a block.
            arguments: tensors and None for pointers, numbers for ``int``.
        """
        values = tuple(a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in arguments)
        types = tuple(ctypes.c_int if isinstance(a, int) else ctypes.c_void_p for a in arguments)
        stream, size = torch.cuda.current_stream().cuda_stream, self.shared_bytes
        _checked(driver.cuLaunchKernel(self.function, blocks, 1, 1, threads, 1, 1, size, stream, (values, types), 0))


def _build(source: str, name: str, architecture: str) -> bytes:
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    try:
        options = [f"--gpu-architecture={architecture}".encode()]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"{name} cannot be compiled: {log.decode(errors='replace')}".rstrip("\0\n "))
        binary = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, binary))
        return binary
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a call gives beside its error, which is raised."""
    error, *rest = answer
    if error.value:
        raise RuntimeError(f"CUDA says {error.name}")
    return rest[0] if rest else None
