"""``fpq inspect``: what packed layers hold and run on."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from models import run_fpq, save_tiny, tiny_pipeline, tiny_text_to_image
from safetensors import safe_open
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fpq_lightning import (
    ActivationRecipe,
    AttentionRecipe,
    CalibrationDataModule,
    Recipe,
    RoundingRecipe,
    SamplerConfig,
    WeightRecipe,
)
from fpq_lightning import quantize as run_quantize
from fpq_lightning.nn.backends.hardware import Hardware
from fpq_lightning.storage.inspect import LayerSummary, inspect_pipeline, low_bit_share, render
from fpq_lightning.storage.pipeline import read_description

HOPPER = Hardware((9, 0), kernels=True)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image pipeline in hardware types."""
    root = tmp_path_factory.mktemp("inspect")
    pipeline = DiffusionPipeline.from_pretrained(tiny_text_to_image(root / "model"))
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel(  # wide enough for tensor cores
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=16, attention_head_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    recipe = Recipe(
        weights=WeightRecipe("fp4", objective="tensor"),
        activations=ActivationRecipe("fp8"),
        rounding=RoundingRecipe(start="nearest"),
        hardware_types=True,
    )
    sampler = SamplerConfig(steps=2, prompts=["a", "b"], guidance_scale=2.0)
    data = CalibrationDataModule(n_samples=4, n_search=2, held_out_fraction=0.5)
    run_quantize(pipeline, recipe, root / "run", data, sampler, accelerator="cpu")
    return root / "run" / "quantized"


def test_operations_are_those_that_torch_counts(packed: Path) -> None:
    layers = inspect_pipeline(packed, HOPPER, torch.bfloat16)
    pipeline = DiffusionPipeline.from_pretrained(packed)
    counted: dict[str, float] = {}
    counter = FlopCounterMode(mods=pipeline.unet, display=False)
    handles, before = [], {}
    for name, module in pipeline.unet.named_modules():
        if name in {layer.name for layer in layers}:
            handles.append(
                module.register_forward_pre_hook(lambda m, a, n=name: before.update({n: counter.get_total_flops()}))
            )
            handles.append(
                module.register_forward_hook(
                    lambda m, a, o, n=name: counted.update({n: counter.get_total_flops() - before[n]})
                )
            )
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 16)  # both passes of guidance
    with counter, torch.no_grad():
        pipeline.unet(x, torch.tensor(500), text)
    assert {layer.name: layer.operations for layer in layers} == pytest.approx(counted)


def test_bytes_are_those_in_the_file(packed: Path) -> None:
    layers = inspect_pipeline(packed, HOPPER, torch.bfloat16)
    sizes: dict[str, int] = {}
    with safe_open(packed / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            sizes[key] = tensor.numel() * tensor.element_size()
    for layer in layers:
        assert layer.bytes == sum(size for key, size in sizes.items() if key.startswith(f"{layer.name}."))


def test_paths_are_those_of_the_hardware(packed: Path) -> None:
    on_hopper = inspect_pipeline(packed, HOPPER, torch.bfloat16)
    unet = DiffusionPipeline.from_pretrained(packed).unet
    for layer in on_hopper:
        assert layer.weights == ("float4_e2m1fn",) * len(layer.weights)
        module = unet.get_submodule(layer.name)
        if isinstance(module, nn.Linear):
            assert layer.path in ("fp8", "weight_only")
        else:  # the first convolution has four channels
            assert layer.path == ("decode" if module.in_channels % 16 else "fp8_conv")
    assert {layer.path for layer in on_hopper} == {"fp8", "fp8_conv", "weight_only", "decode"}
    assert 0 < low_bit_share(on_hopper) < 1
    assert low_bit_share(inspect_pipeline(packed, Hardware(), torch.bfloat16)) == 0
    assert low_bit_share(inspect_pipeline(packed, HOPPER, torch.float32)) == 0


def test_the_table_ends_with_totals() -> None:
    layers = [
        LayerSummary("a", (32, 64), ("e2m1",), ("float8_e4m3fn",), 1152, "fp8", 300.0),
        LayerSummary("b", (8, 8, 3, 3), ("e2m1", "e3m0"), (), 400, "decode", 100.0),
    ]
    *_, a, b, total = render(layers).splitlines()
    assert a.split() == ["a", "32x64", "e2m1", "float8_e4m3fn", "1,152", "fp8", "75.00%"]
    assert b.split() == ["b", "8x8x3x3", "e2m1+e3m0", "-", "400", "decode", "25.00%"]
    assert "2 layers, 1,552 bytes (0.296 of half precision)" in total
    assert "75.0% of their operations" in total


def test_the_command_prints_it(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_fpq(capsys, ["inspect", str(packed), "--capability=9.0"])
    assert outcome.code == 0, outcome.err
    assert "on low-bit paths" in outcome.out
    assert re.search(r"; quantized: 9\d\.\d\d% of the denoiser's parameters; in full precision: .*norms", outcome.out)
    assert run_fpq(capsys, ["inspect", str(packed)]).out.count(" decode ") == len(outcome.out.splitlines()) - 2


@pytest.mark.parametrize("alone", [False, True])
def test_a_model_with_quantized_attention_is_inspected_with_it(
    alone: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(
        weights=WeightRecipe(None if alone else "fp4"),
        activations=ActivationRecipe(None),
        attention=AttentionRecipe("fp8"),
        rounding=RoundingRecipe(start="nearest"),
        include=["mid_block.attentions.*"],
    )
    data = CalibrationDataModule(n_samples=4, n_search=2, held_out_fraction=0.5)
    run_quantize(tiny_pipeline(), recipe, tmp_path / "run", data, SamplerConfig(steps=2), accelerator="cpu")
    outcome = run_fpq(capsys, ["inspect", str(tmp_path / "run" / "quantized")])
    assert outcome.code == 0, outcome.err
    assert "mid_block.attentions.0.to_q" in outcome.out
    description = read_description(tmp_path / "run" / "quantized")["attention"]
    ((_, operands),) = description.items()
    said = re.search(r"attention of 1 module is quantized \((.*)\)", outcome.out)
    assert said is not None
    assert all(quantizer["format"] in said[1] for quantizer in operands)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["MODEL"], "holds no packed layers: quantize it with fpq fit"),
        (["MODEL/unet"], "it is a single model, give the directory of a diffusers pipeline"),
        (["RUN"], "RUN/quantized"),
        (["nowhere"], "nowhere"),
        (["MODEL", "--capability=hopper"], "give it as 9.0"),
    ],
)
def test_what_cannot_be_inspected_is_said(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(save_tiny(tmp_path / "model"))
    save_tiny(tmp_path / "run" / "quantized")
    names = {"MODEL": model, "RUN": str(tmp_path / "run")}
    for name, place in names.items():
        arguments, said = [a.replace(name, place) for a in arguments], said.replace(name, place)
    outcome = run_fpq(capsys, ["inspect", *arguments])
    assert outcome.code
    assert said in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_truncated_weights_are_named_as_export_names_them(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    outcome = run_fpq(capsys, ["inspect", str(copy)])
    assert outcome.code
    assert "is truncated" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
