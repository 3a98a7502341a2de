"""The Triton kernels, run by Triton's interpreter on the CPU: bit-equal to plain torch, gradients up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from fpq_lightning.formats.numbers import parse_format
from fpq_lightning.kernels.launch import Launcher
from fpq_lightning.quantization.quantizer import Quantizer
from fpq_lightning.quantization.rounding import LearnedRounding

T = TypeVar("T")
FORMATS = ["e5m2", "e4m3", "e3m4", "e2m5", "float8_e4m3fn", "float8_e5m2", "ue4m4", "ue2m6", "e2m1", "e1m2", "int8"]
FORMATS += ["uint8", "int4", "float4_e2m1fn", "e3m0", "e5m0", "ue4m0"]
SCALE = 0.37


@pytest.fixture(autouse=True)
def _kernels_off_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def _both(monkeypatch: pytest.MonkeyPatch, run: Callable[[], T]) -> tuple[T, T]:
    """The result of plain torch and that of the kernels."""
    monkeypatch.setenv("FPQ_KERNELS", "0")
    plain = run()
    monkeypatch.setenv("FPQ_KERNELS", "1")
    return plain, run()


def _bits(x: Tensor) -> Tensor:
    return x.nan_to_num(123.0).view(torch.int32)


def _adversarial(name: str) -> Tensor:
    """Random values of every magnitude, special ones, every grid value and every tie."""
    fmt = parse_format(name)
    torch.manual_seed(0)
    x = torch.randn(5000) * torch.logspace(-6, 1.5, 5000)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-42, -1e-42, -0.1])
    ties = (fmt.grid[1:] + fmt.grid[:-1]) / 2
    return torch.cat([special, fmt.grid * SCALE, ties * SCALE, -ties * SCALE, x])


@pytest.mark.parametrize("offset", [None, -0.3])
@pytest.mark.parametrize("name", FORMATS)
def test_fake_quantization_is_bit_equal_to_plain_torch(
    monkeypatch: pytest.MonkeyPatch, name: str, offset: float | None
) -> None:
    x = _adversarial(name)
    place = None if offset is None else torch.tensor(offset)
    quantizer = Quantizer(parse_format(name), torch.tensor(SCALE), place)
    plain, kernel = _both(monkeypatch, lambda: quantizer(x))
    assert torch.equal(plain.isnan(), kernel.isnan())
    assert torch.equal(_bits(plain), _bits(kernel))


def test_half_precision_goes_through_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter rounds to bfloat16 otherwise than GPUs do, so float16 stands for both.
    x = torch.randn(3000).half()
    plain, kernel = _both(monkeypatch, lambda: Quantizer(parse_format("e4m3"), torch.tensor(SCALE))(x))
    assert kernel.dtype == torch.float16
    assert torch.equal(plain, kernel)


@pytest.mark.parametrize("offset", [None, -0.3])
@pytest.mark.parametrize("name", ["e4m3", "ue4m4", "int8", "uint8", "e2m1"])
def test_gradients_of_fake_quantization_agree(monkeypatch: pytest.MonkeyPatch, name: str, offset: float | None) -> None:
    x = _adversarial(name).nan_to_num(0.0, 3.0, -3.0)[:5000].reshape(2, -1).t()  # not contiguous
    gradient = torch.randn(x.shape)

    def run() -> tuple[Tensor, Tensor]:
        seen = x.clone().requires_grad_(True)
        place = None if offset is None else torch.tensor(offset)
        quantizer = Quantizer(parse_format(name), torch.tensor(SCALE), place)
        quantizer.learn_scale()
        quantizer(seen).backward(gradient)
        assert seen.grad is not None
        assert quantizer.log_gain is not None
        assert quantizer.log_gain.grad is not None
        return seen.grad, quantizer.log_gain.grad

    (dx, dscale), (kernel_dx, kernel_dscale) = _both(monkeypatch, run)
    assert torch.allclose(dx, kernel_dx, rtol=1e-5, atol=1e-6)
    assert torch.allclose(dscale, kernel_dscale, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("hardness", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "columns", "scales"), [(7, 1500, 7), (1, 5000, 1), (33, 9, 33)])
@pytest.mark.parametrize("name", ["e2m1", "e3m0", "int4", "uint4"])
def test_learned_rounding_and_its_regulariser_agree_with_their_gradients(
    monkeypatch: pytest.MonkeyPatch, name: str, rows: int, columns: int, scales: int, hardness: float
) -> None:
    fmt = parse_format(name)
    torch.manual_seed(1)
    weight = torch.randn(rows, columns)
    scale = weight.abs().amax(1, keepdim=True)[:scales] / fmt.max * 0.8  # some values lie beyond the range
    offset = -scale * fmt.max / 2 if fmt.min == 0 else None
    moved, gradient = torch.randn(rows, columns), torch.randn(rows, columns)

    def run() -> list[Tensor]:
        quantizer = Quantizer(fmt, scale, offset)
        quantizer.learn_scale()
        rounding = LearnedRounding(quantizer, weight)
        rounding.v.data.add_(moved)
        rounding.hardness = torch.tensor(hardness)
        out, regulariser = rounding(), rounding.regulariser(torch.tensor(3.7))
        ((out * gradient).sum() + 5 * regulariser).backward()
        assert rounding.v.grad is not None
        assert quantizer.log_gain is not None
        assert quantizer.log_gain.grad is not None
        return [out.detach(), regulariser.detach(), rounding.v.grad, quantizer.log_gain.grad]

    for plain, kernel in zip(*_both(monkeypatch, run), strict=True):
        assert torch.allclose(plain, kernel, rtol=1e-4, atol=2e-5)


class RecordedKernel:
    """Stands in for a kernel of Triton: keeps the arguments that it was built for and started with."""

    arg_names = ("x", "n", "BLOCK")

    def __init__(self) -> None:
        self.built: list[tuple] = []
        self.started: list[tuple] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable:
        def run(*arguments: object, **constants: object) -> RecordedKernel:
            self.built.append((grid, *arguments, constants))
            return self

        def again(*arguments: object) -> None:
            self.started.append((grid, *arguments))

        return lambda *arguments, **constants: run(*arguments, **constants) if constants else again(*arguments)


def test_a_launcher_builds_each_variant_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel = RecordedKernel()
    launch, grid, x = Launcher(kernel, BLOCK=8, num_warps=4), (2, 1, 1), torch.zeros(64)
    launch(grid, x, 32)
    assert kernel.built == [(grid, x, 32, {"BLOCK": 8, "num_warps": 4})]
    launch((3, 1, 1), x, 48)
    assert kernel.started == [((3, 1, 1), x, 48, 8)]  # with the compile-time arguments, which take part in its place
    # What Triton builds another variant for: types, addresses and numbers that 16 does not divide, one, 64 bits.
    for others in ((x.half(), 32), (x[1:], 32), (x, 33), (x, 1), (x, 2**31)):
        before = len(kernel.built)
        launch(grid, *others)
        assert len(kernel.built) == before + 1
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch(grid, x, 32)
    assert len(kernel.built) == 7
    assert len(kernel.started) == 1
