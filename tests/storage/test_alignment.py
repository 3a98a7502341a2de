"""What is computed on a CPU does not depend on where tensors lie in files, or in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MakeNetwork
from diffusers import UNet2DConditionModel
from models import save_tiny, tiny_pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fpq_lightning as fpq
from fpq_lightning.diffusion.pipelines import load_pipeline, move_pipeline
from fpq_lightning.nn.packed_layer import packed_layers
from fpq_lightning.utils.alignment import align


def _elsewhere(tensor: Tensor, elements: int = 1) -> Tensor:
    """A copy that begins some elements after where torch would let it begin."""
    room = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)
    return room[elements:].view(tensor.shape).copy_(tensor)


def _misplace(module: nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = _elsewhere(tensor.data)


def _places(module: nn.Module) -> set[int]:
    return {p.data_ptr() % 64 for p in module.parameters()}


def test_the_product_of_a_row_is_that_of_an_aligned_weight() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16), torch.randn(1, 16)
    expected, weight = layer(x), layer.weight
    _misplace(layer)
    assert _places(layer) == {4}
    align(layer)
    assert torch.equal(layer(x), expected)
    assert layer.weight is weight  # which optimisers and hooks refer to
    kept = layer.weight.data_ptr()
    align(layer)
    assert layer.weight.data_ptr() == kept


@torch.no_grad()
def _output(unet: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 5, 12, generator=draw)
    return unet(x, torch.tensor(300), text).sample


def test_an_opened_model_gives_the_same_bits_wherever_its_tensors_lie_in_the_file(
    make_network: MakeNetwork, tmp_path: Path
) -> None:
    make_network("conditional_unet")[0].save_pretrained(tmp_path / "plain")
    config = fpq.FPQConfig("fp4", modules_to_not_convert=["time_embedding", "time_emb_proj"])
    model = UNet2DConditionModel.from_pretrained(tmp_path / "plain", quantization_config=config).eval()
    model.save_pretrained(tmp_path / "packed")
    (file,) = (tmp_path / "packed").glob("*.safetensors")
    tensors = load_file(file)
    for padding in range(0, 64, 8):
        save_file(tensors, file, {"format": "pt", "padding": "x" * padding})
        opened = UNet2DConditionModel.from_pretrained(tmp_path / "packed").eval()
        assert packed_layers(opened)
        assert _places(opened) == {0}
        assert torch.equal(_output(opened), _output(model))


@pytest.mark.parametrize("offload", [False, True])
def test_a_run_gives_the_same_bits_wherever_the_tensors_of_its_model_lie(offload: bool, tmp_path: Path) -> None:
    files = []
    for name in ("aligned", "misplaced"):
        pipeline = tiny_pipeline()
        if name == "misplaced":
            _misplace(pipeline.unet)
        recipe = fpq.Recipe(rounding=fpq.RoundingRecipe(start="nearest", learned=False), include=["conv_in"])
        data = fpq.CalibrationDataModule(n_samples=8, n_search=4, micro_batch=1)
        sampler = fpq.SamplerConfig(steps=2, batch_size=1)
        fpq.quantize(pipeline, recipe, tmp_path / name, data, sampler, accelerator="cpu", offload=offload)
        files.append(next((tmp_path / name / "quantized" / "unet").glob("*.safetensors")).read_bytes())
    assert files[0] == files[1]


def test_a_pipeline_that_is_moved_to_the_cpu_is_aligned(tmp_path: Path) -> None:
    pipeline = load_pipeline(save_tiny(tmp_path / "model"))
    _misplace(pipeline.unet)
    move_pipeline(pipeline, torch.device("cpu"))
    assert _places(pipeline.unet) == {0}
