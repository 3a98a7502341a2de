"""The CUDA kernel of few rows: how products are cut, when it is taken, and that it builds; what needs no GPU."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from fpq_lightning.formats.numbers import Format, parse_format
from fpq_lightning.kernels import skinny_gemm, weight_gemm

E2M1 = parse_format("e2m1")
SHARED_BYTES = 227 * 1024  # that a block of threads can have
SIZES = [(12288, 3072), (3072, 3072), (3072, 12288), (10240, 1280), (1280, 5120), (21504, 3072), (320, 320), (16, 128)]
CPU = torch.device("cpu")

Operands = tuple[Tensor, Tensor, Format, Tensor | None]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the CPU one, as far as the choice of a kernel goes, and forgets what was built before and after."""
    caches = (skinny_gemm.works, skinny_gemm._variant, skinny_gemm._kernel)
    for kept in caches:
        kept.cache_clear()
    monkeypatch.setattr(skinny_gemm, "_is_hopper", lambda device: True)
    yield
    for kept in caches:
        kept.cache_clear()


def product(x: Tensor, codes: Tensor, fmt: Format, scale: Tensor, bias: Tensor | None) -> Tensor:
    weight = fmt.values[torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()] * scale
    return (x.float() @ weight.T + (0 if bias is None else bias.float())).to(x.dtype)


@given(st.integers(1, 8000), st.integers(1, 600), st.integers(1, 64))
def test_tilings_cover_all_sizes_and_find_room(n16: int, chunks: int, m: int) -> None:
    n, columns = 16 * n16, next(c for c in (8, 16, 32, 64) if c >= m)
    cut = skinny_gemm.tiling_for(n, 128 * chunks, m)
    assert cut == skinny_gemm.tiling_for(n, 128 * chunks, columns)  # for which it is built
    assert 1 <= cut.splits <= min(8, chunks)
    assert cut.groups >= 1
    assert cut.stages >= 1
    assert cut.shared_bytes(columns) <= SHARED_BYTES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skinny_gemm, "_kernel", lambda tiling, *_: tiling)
        kernel, blocks, threads = skinny_gemm._variant.__wrapped__(n, 128 * chunks, columns, E2M1, 0, None)
    assert kernel == cut
    tiles, alone = divmod(blocks, cut.splits)
    assert not alone
    assert (tiles - 1) * cut.outputs < n <= tiles * cut.outputs
    assert threads == cut.outputs * 2  # the 32 lanes of a warp have 16 output channels


def test_the_tilings_that_measured_best_are_chosen() -> None:
    chosen = {(n, k, m): tuple(skinny_gemm.tiling_for(n, k, m)) for n, k in SIZES[:2] + SIZES[3:4] for m in (1, 16, 64)}
    # Each the fastest of about ten or within 1.5 percent of it; (10240, 1280, 16) had five stages.
    assert chosen == {
        (12288, 3072, 1): (1, 2, 6), (12288, 3072, 16): (3, 2, 4), (12288, 3072, 64): (3, 2, 4),
        (3072, 3072, 1): (1, 8, 3), (3072, 3072, 16): (2, 8, 3), (3072, 3072, 64): (2, 8, 2),
        (10240, 1280, 1): (1, 3, 4), (10240, 1280, 16): (3, 2, 4), (10240, 1280, 64): (3, 2, 3),
    }  # fmt: skip


def operands(m: int = 3, n: int = 32, k: int = 256, fmt: str = "e2m1", dtype: torch.dtype = torch.bfloat16) -> Operands:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    return torch.randn(m, k).to(dtype), codes, parse_format(fmt), torch.randn(n).to(dtype)


def misaligned(x: Tensor) -> Tensor:
    room = x.new_empty(x.numel() + 1)
    return room[1:].view(x.shape).copy_(x)


def test_operands_that_the_kernel_takes() -> None:
    x, codes, fmt, bias = operands()
    assert skinny_gemm.fits(x, codes, fmt, bias)
    assert skinny_gemm.fits(x, codes, fmt, None)
    assert skinny_gemm.fits(*operands(m=64, n=16, k=128))
    assert not skinny_gemm.fits(*operands(m=65))
    assert not skinny_gemm.fits(*operands(m=0))
    assert not skinny_gemm.fits(*operands(n=24))
    assert not skinny_gemm.fits(*operands(k=192))
    assert not skinny_gemm.fits(*operands(dtype=torch.float16)[:3], None)
    assert not skinny_gemm.fits(x, codes, fmt, bias.float())
    assert not skinny_gemm.fits(misaligned(x), codes, fmt, bias)
    assert not skinny_gemm.fits(x, misaligned(codes), fmt, bias)
    assert not skinny_gemm.fits(x, codes, fmt, misaligned(bias))


def test_formats_that_the_kernel_takes() -> None:
    names = ["e2m1", "e1m2", "e3m0", "float4_e2m1fn", "int4", "uint4", "ue2m2", "ue3m1", "e2m2", "float8_e4m3fn"]
    assert [name for name in names if skinny_gemm.fits(*operands(fmt=name))] == names[:4]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("works", [True, False])
def test_products_go_to_the_kernel_where_it_fits_and_works(
    fits: bool, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    calls = []

    def kernel(*args: object) -> Tensor:
        calls.append(args)
        return product(*args) if works else torch.zeros(64, 16).bfloat16()

    monkeypatch.setattr(skinny_gemm, "skinny_gemm", kernel)
    x, codes, fmt, bias = operands(m=2 if fits else 65)
    scale = torch.rand(32, 1)
    monkeypatch.setattr(weight_gemm, "_launch", lambda *args: "Triton's")
    with warnings.catch_warnings():
        warnings.simplefilter("error" if works or not fits else "ignore")
        outs = [weight_gemm.weight_gemm(x, codes, fmt, scale, bias) for _ in range(2)]
    if fits and works:
        assert all(torch.equal(out, product(x, codes, fmt, scale, bias)) for out in outs)
        assert len(calls) == 3  # a trial before
    else:
        assert outs == ["Triton's", "Triton's"]
        assert len(calls) == fits  # a trial
    assert weight_gemm.weight_gemm(x, codes, fmt, scale, bias, weight_gemm.Tiling(16, 32, 1, 4, 2)) == "Triton's"


@pytest.mark.usefixtures("hopper")
def test_a_single_wrong_value_rules_the_kernel_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for code in range(16):
        if E2M1.values[code] == 0:  # there is no zero that is wrong by its sign alone: sums begin at zero
            continue

        def kernel(x: Tensor, codes: Tensor, fmt: Format, *rest: Tensor, code: int = code) -> Tensor:
            values = fmt.values.clone()
            values[code] *= -1
            weight = values[torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()]
            return (x.float() @ weight.T).to(x.dtype)

        monkeypatch.setattr(skinny_gemm, "skinny_gemm", kernel)
        skinny_gemm.works.cache_clear()
        with pytest.warns(UserWarning, match="other values"):
            assert not skinny_gemm.works(E2M1, CPU)


@pytest.mark.usefixtures("hopper")
def test_without_the_package_triton_is_taken_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fpq_lightning.kernels.cuda", raising=False)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not skinny_gemm.works(E2M1, CPU)


@pytest.mark.usefixtures("hopper")
def test_a_kernel_that_cannot_be_built_is_left_to_triton_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    built = skinny_gemm.source
    monkeypatch.setattr(skinny_gemm, "source", lambda *args: built(*args).replace("wgmma.fence", "wgmma.fance"))
    with pytest.warns(UserWarning, match="skinny_gemm cannot be") as caught:
        assert not skinny_gemm.works(E2M1, CPU)
    (said,) = caught
    assert "\n" not in str(said.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not skinny_gemm.works(E2M1, CPU)  # it says so once


def test_other_devices_are_not_tried() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not skinny_gemm.works(E2M1, CPU)


@pytest.mark.parametrize("columns", [8, 16, 32, 64])
def test_the_kernel_builds_and_keeps_all_in_registers(columns: int) -> None:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    cuts = {skinny_gemm.tiling_for(n, k, columns) for n, k in SIZES}
    assert len({cut.splits == 1 for cut in cuts}) == 2
    for fmt in (E2M1,) if columns < 64 else (E2M1, parse_format("e1m2"), parse_format("e3m0")):
        for cut in sorted(cuts):
            _, program = nvrtc.nvrtcCreateProgram(skinny_gemm.source(cut, columns, fmt).encode(), b"", 0, [], [])
            options = [f"--gpu-architecture={skinny_gemm.ARCHITECTURE}".encode(), b"--ptxas-options=-v"]
            (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
            log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
            nvrtc.nvrtcGetProgramLog(program, log)
            text = log.decode()
            assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS, text
            assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", text)
            assert "warning" not in text.lower()
