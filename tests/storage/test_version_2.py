"""Packed files of version 2 still open.

`packed_v2/pipeline` was written by the last commit that wrote version 2: a tiny text-to-image pipeline with E4M3 block
scales, quantized attention and parts. Beside it lie what its denoiser gave for an input, and a hash of what it decoded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from models import run_fpq
from packed_reader import read_denoiser
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fpq_lightning import load_quantized
from fpq_lightning.nn.attention import packed_attention
from fpq_lightning.nn.packed_layer import packed_layers
from fpq_lightning.nn.packed_weight import BlockScaledWeight

HERE = Path(__file__).parent / "packed_v2"
UNET = HERE / "pipeline" / "unet"
WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD, NEW = ".variants.learned.inputs.", ".operands."


def output(unet: nn.Module) -> Tensor:
    inputs = load_file(HERE / "expected.safetensors")
    del inputs["output"]
    with torch.no_grad():
        return unet.eval()(**inputs).sample


def digest(unet: nn.Module) -> str:
    """Of decoded weights, and of the scales of inputs and attention."""
    found = hashlib.sha256()
    for name, layer in sorted(packed_layers(unet).items()):
        found.update(name.encode() + layer.decode_weight().numpy().tobytes())
        for quantizer in layer.inputs:
            found.update(quantizer.scale.numpy().tobytes())
    for name, module in sorted(packed_attention(unet).items()):
        found.update(name.encode())
        for quantizer in module.operands:
            found.update(quantizer.format.name.encode() + quantizer.scale.numpy().tobytes())
    return found.hexdigest()


def version(unet: Path) -> int:
    return json.loads((unet / "config.json").read_text())["quantization_config"]["format_version"]


def set_version(unet: Path, number: int) -> None:
    config = json.loads((unet / "config.json").read_text())
    config["quantization_config"]["format_version"] = number
    (unet / "config.json").write_text(json.dumps(config))


@pytest.fixture
def renamed(tmp_path: Path) -> Path:
    """The same files in version 3, by renaming tensors."""
    unet = Path(shutil.copytree(UNET, tmp_path / "renamed"))
    set_version(unet, 3)
    tensors = {name.replace(OLD, NEW): value for name, value in load_file(UNET / WEIGHTS).items()}
    save_file(tensors, unet / WEIGHTS, {"format": "pt"})
    return unet


def test_it_opens_to_the_same_bits(renamed: Path) -> None:
    assert version(UNET) == 2
    assert any(OLD in name for name in load_file(UNET / WEIGHTS))
    unet = UNet2DConditionModel.from_pretrained(UNET)
    layers = packed_layers(unet).values()
    assert any(isinstance(part, BlockScaledWeight) for layer in layers for part in layer.weights)
    assert any(len(layer.splits) > 1 for layer in layers)
    assert len(packed_attention(unet)) == 8
    assert digest(unet) == (HERE / "expected.sha256").read_text().strip()
    found, expected = output(unet), load_file(HERE / "expected.safetensors")["output"]
    assert torch.equal(found, output(UNet2DConditionModel.from_pretrained(renamed)))
    # Sums of another CPU may differ in their last bits, and a value then be rounded to the other side.
    assert ((found - expected).square().mean() / expected.square().mean()).sqrt() < 1e-3
    for pipeline in (DiffusionPipeline.from_pretrained(HERE / "pipeline"), load_quantized(HERE / "pipeline")):
        assert torch.equal(output(pipeline.unet), found)


def test_it_is_written_again_in_version_3(renamed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    UNet2DConditionModel.from_pretrained(UNET).save_pretrained(tmp_path / "again")
    assert version(tmp_path / "again") == 3
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (renamed / WEIGHTS).read_bytes()
    read_denoiser(tmp_path / "again")
    exported = run_fpq(capsys, ["export", str(HERE / "pipeline"), "--format=fpq", f"--output={tmp_path / 'exported'}"])
    assert exported.code == 0, exported.err
    assert version(tmp_path / "exported" / "unet") == 3
    assert load_file(tmp_path / "exported" / "unet" / WEIGHTS).keys() == load_file(renamed / WEIGHTS).keys()


def test_its_shards_open_too(tmp_path: Path) -> None:
    unet = Path(shutil.copytree(UNET, tmp_path / "shards"))
    tensors = load_file(unet / WEIGHTS)
    (unet / WEIGHTS).unlink()
    files = {name: f"diffusion_pytorch_model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, unet / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (unet / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    whole, sharded = (output(UNet2DConditionModel.from_pretrained(directory)) for directory in (UNET, unet))
    assert torch.equal(sharded, whole)


def test_names_of_one_version_do_not_go_with_the_other(renamed: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(UNET, tmp_path / "old"))
    set_version(old, 3)
    with pytest.raises(ValueError, match=r"the files lack \S+\.operands\.0\.scale and \d+ more$"):
        UNet2DConditionModel.from_pretrained(old)
    set_version(old, 4)
    with pytest.raises(ValueError, match=r"format version 4; this fpq_lightning reads versions 2 and 3$"):
        UNet2DConditionModel.from_pretrained(old)
