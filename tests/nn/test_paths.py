"""Arithmetic paths as plug-ins: one that the package does not know is chosen, run and shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from models import run_fpq, tiny_pipeline
from test_backends import packed_linear
from torch import Tensor, nn

import fpq_lightning as fpq
from fpq_lightning.nn.backends.hardware import Hardware
from fpq_lightning.nn.backends.paths import PATHS, ArithmeticPath
from fpq_lightning.nn.operands import Operands

BEFORE_ALL, LAST = -1, 1000


def path(**options: object) -> ArithmeticPath:
    """Sums of the input, of Linear layers with 16 inputs or more."""

    def run(x: Tensor, operands: Operands) -> Tensor:
        return x.sum(-1, keepdim=True).expand(*x.shape[:-1], operands.outputs)

    def fits(operands: Operands) -> bool:
        return operands.convolution is None and sum(operands.splits) >= 16

    defaults = {"rank": BEFORE_ALL, "fits": fits, "available": lambda hardware, dtype: True, "run": run}
    return ArithmeticPath(name="sums", help="sums of the input", **{**defaults, **options})  # type: ignore[arg-type]


@pytest.fixture
def sums() -> Iterator[ArithmeticPath]:
    with PATHS.temporarily(path()) as added:
        yield added


def test_it_computes_the_layers_that_it_fits(sums: ArithmeticPath) -> None:
    layer, x = packed_linear().requires_grad_(False), torch.randn(5, 48).bfloat16()
    convolution = packed_linear(layer=nn.Conv2d(48, 32, 1)).requires_grad_(False)
    image = torch.randn(1, 48, 2, 2).bfloat16()
    expected = x.sum(-1, keepdim=True).expand(5, 32)
    assert torch.equal(layer(x), expected)
    assert torch.equal(convolution(image), convolution.simulate(image))
    torch.compiler.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    fpq.set_arithmetic(layer, "simulated")
    assert torch.equal(layer(x), layer.simulate(x))


@pytest.mark.parametrize(
    "options",
    [
        {"rank": LAST},
        {"fits": lambda operands: False},
        {"available": lambda hardware, dtype: hardware.kernels},
        {"available": lambda hardware, dtype: dtype == torch.float16},
        {"takes": lambda x: x.ndim == 3},
        {"max_rows": 4},
    ],
)
def test_another_path_is_taken_where_it_does_not_apply(options: dict) -> None:
    with PATHS.temporarily(path(**options)):
        layer, x = packed_linear().requires_grad_(False), torch.randn(5, 48).bfloat16()
        assert torch.equal(layer(x), layer.simulate(x))


def test_a_low_bit_path_is_not_asked_for_gradients_and_another_is() -> None:
    x = torch.randn(5, 48).bfloat16().requires_grad_()
    for low_bit in (True, False):
        with PATHS.temporarily(path(low_bit=low_bit)):
            packed_linear()(x).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 32)) == (not low_bit)
        x.grad = None


@pytest.mark.parametrize("low_bit", [False, True])
def test_inspect_shows_it(low_bit: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "model")
    config = fpq.FPQConfig("fp4")
    pipeline.unet = UNet2DModel.from_pretrained(tmp_path / "model" / "unet", quantization_config=config)
    pipeline.save_pretrained(tmp_path / "packed")
    with PATHS.temporarily(path(low_bit=low_bit)):
        shown = run_fpq(capsys, ["inspect", str(tmp_path / "packed")])
    assert shown.code == 0, shown.err
    rows = {line.split()[0]: line.split() for line in shown.out.splitlines()[1:-1]}
    assert {name for name, row in rows.items() if "sums" in row} == {
        name for name, m in pipeline.unet.named_modules() if isinstance(m, nn.Linear) and m.in_features >= 16
    }
    assert "decode" in rows["conv_in"]
    share = re.search(r"; ([\d.]+)% of their operations on low-bit paths", shown.out)
    assert share is not None
    assert (float(share[1]) > 0) == low_bit


def test_a_layer_names_what_it_may_take(sums: ArithmeticPath) -> None:
    layer = packed_linear("e2m1")
    assert layer.paths == ("sums", "weight_only", "fp8", "decode")
    assert [PATHS[name].low_bit for name in layer.paths] == [True, True, True, False]
    assert all(PATHS[name].help for name in layer.paths)
    assert not PATHS["fp8"].available(Hardware(), torch.bfloat16)
