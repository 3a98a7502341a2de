"""Files of a quantized pipeline are what was written, or are refused with the name of what is wrong."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from models import run_fpq, save_tiny, tiny_pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpq_lightning import AttentionRecipe, CalibrationDataModule, Recipe, RoundingRecipe, SamplerConfig, quantize
from fpq_lightning.diffusion.pipelines import load_pipeline
from fpq_lightning.storage.export import export
from fpq_lightning.storage.pipeline import load_quantized
from fpq_lightning.utils import digests

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
BIAS, SCALE = "conv_in.bias", "conv_in.weights.0.scale"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "run"
    recipe = Recipe(attention=AttentionRecipe("fp8"), rounding=RoundingRecipe(start="nearest"))
    data = CalibrationDataModule(n_samples=8, n_search=4, micro_batch=8)
    quantize(tiny_pipeline(), recipe, run, data, SamplerConfig(steps=2), accelerator="cpu", logger=False)
    return run / "quantized"


@pytest.fixture(scope="module")
def dequantized(packed: Path) -> Path:
    export(packed, packed.parent / "dequantized", "dequantized")
    return packed.parent / "dequantized"


@pytest.fixture(params=["packed", "dequantized"])
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "copy"))


@pytest.fixture
def packed_copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


@pytest.fixture
def dequantized_copy(dequantized: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dequantized, tmp_path / "copy"))


def refused(directory: Path, message: str, verify: bool = False) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_quantized(directory, verify=verify)
    assert "\n" not in str(error.value)


def flip(file: Path, place: int) -> None:
    contents = bytearray(file.read_bytes())
    contents[place] ^= 1
    file.write_bytes(contents)


# --- digests ---------------------------------------------------------------------------------------------------


def test_intact_files_open_and_every_file_of_theirs_has_a_digest(copy: Path) -> None:
    load_quantized(copy, verify=True)
    files = {f.relative_to(copy).as_posix() for f in copy.rglob("*") if f.is_file()}
    assert json.loads((copy / "digests.json").read_text()).keys() == files - {"digests.json", "README.md"}


def test_a_flipped_bit_of_the_weights_is_found_when_they_are_verified(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "HEAD", 8)  # as of files that are longer
    shutil.copytree(copy, copy.parent / "written")
    digests.write_digests(copy)
    flip(copy / WEIGHTS, -3)
    load_quantized(copy)
    refused(copy, r"diffusion_pytorch_model\.safetensors is damaged", verify=True)


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
def test_a_changed_configuration_is_refused(copy: Path, name: str) -> None:
    config = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps({**config, "unknown": 1}))
    refused(copy, rf"{name} is damaged.*delete .*digests\.json if the change is meant")
    (copy / "digests.json").unlink()
    load_quantized(copy)


@pytest.mark.parametrize("value", [10**6, 2**62, 1e300])
def test_no_network_is_made_from_a_damaged_number_of_layers(packed_copy: Path, value: float) -> None:
    file = packed_copy / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layers_per_block": value}))
    refused(packed_copy, r"unet/config\.json is damaged")


def test_inspect_and_export_verify_what_they_read(
    packed_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(digests, "HEAD", 8)
    digests.write_digests(packed_copy)
    flip(packed_copy / WEIGHTS, -3)
    export_it = ["export", str(packed_copy), "--format=dequantized", f"--output={tmp_path / 'out'}"]
    for command in (["inspect", str(packed_copy)], export_it):
        outcome = run_fpq(capsys, command)
        assert outcome.code == 1
        assert [WEIGHTS.name in line for line in outcome.errors] == [True], outcome.err
    assert not (tmp_path / "out").exists()


def test_files_of_an_older_version_open_without_digests(copy: Path) -> None:
    (copy / "digests.json").unlink()
    load_quantized(copy, verify=True)


# --- tensors ---------------------------------------------------------------------------------------------------


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        found = load_file(directory / WEIGHTS)
        change(found)
        save_file(found, directory / WEIGHTS, {"format": "pt"})

    return edit


OF_BOTH: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing bias": (tensors(lambda t: t.pop(BIAS)), f"the files lack {BIAS}$"),
    "two missing": (tensors(lambda t: [t.pop(BIAS), t.pop("conv_out.bias")]), f"lack {BIAS} and 1 more"),
    "a tensor too much": (tensors(lambda t: t.update(extra=torch.ones(2))), "the files hold extra, which"),
    "one of a layer too much": (tensors(lambda t: t.update({"conv_in.x": torch.ones(2)})), r"hold conv_in\.x, which"),
    "an integer bias": (tensors(lambda t: t.update({BIAS: t[BIAS].long()})), rf"{BIAS} is I64 .* but should be F32"),
    "an integer norm": (tensors(lambda t: t.update({"conv_norm_out.bias": torch.ones(8).int()})), "conv_norm_out.bias"),
    "a bias in eight bits": (tensors(lambda t: t.update({BIAS: t[BIAS].to(torch.float8_e4m3fn)})), f"{BIAS} is F8"),
    "a bias of another shape": (tensors(lambda t: t.update({BIAS: t[BIAS][:, None].clone()})), f"{BIAS} .*8, 1"),
}
OF_PACKED = {
    f"a scale of {value}": (tensors(lambda t, v=value: t[SCALE].view(-1)[:1].fill_(v)), f"{SCALE} holds a scale")
    for value in (math.nan, math.inf, -math.inf, -0.5, 0.0)
}


@pytest.mark.parametrize("damage", OF_BOTH)
def test_tensors_that_do_not_fit_are_named(copy: Path, damage: str) -> None:
    change, message = OF_BOTH[damage]
    change(copy)
    refused(copy, message)


def test_half_precision_moves_dequantized_weights_off_their_grid_and_is_refused(dequantized_copy: Path) -> None:
    tensors(lambda t: t.update({"conv_in.weight": t["conv_in.weight"].half()}))(dequantized_copy)
    refused(dequantized_copy, r"conv_in\.weight is F16 .* but should be F32")


@pytest.mark.parametrize("damage", OF_PACKED)
def test_scales_that_cannot_be_are_named(packed_copy: Path, damage: str) -> None:
    change, message = OF_PACKED[damage]
    change(packed_copy)
    refused(packed_copy, message)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5, 0.0])
@pytest.mark.parametrize("kind", ["layers", "attention"])
def test_scales_of_inputs_in_the_description_that_cannot_be_are_named(
    dequantized_copy: Path, kind: str, value: float
) -> None:
    file = dequantized_copy / "quantization.json"
    description = json.loads(file.read_text())
    entry = next(iter(description[kind].items()))
    quantizers = entry[1]["inputs"] if kind == "layers" else entry[1]
    quantizers[0]["scale"] = value
    file.write_text(json.dumps(description))
    refused(dequantized_copy, f"quantization.json does not fit .*{entry[0]}.*holds a scale that is no positive number")


# --- what is no file -------------------------------------------------------------------------------------------

IN_PLACE: dict[str, Callable[[Path, Path], Any]] = {
    "a pipe": lambda place, outside: os.mkfifo(place),
    "a directory": lambda place, outside: place.mkdir(),
    "a device": lambda place, outside: place.symlink_to("/dev/zero"),
    "a link that leads out": lambda place, outside: place.symlink_to(outside),
}


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("name", [str(WEIGHTS), "unet/config.json", "model_index.json", "digests.json"])
def test_what_is_no_file_is_refused_and_never_waited_for(packed_copy: Path, name: str, kind: str) -> None:
    outside = packed_copy.parent / "outside"
    shutil.move(packed_copy / name, outside)
    IN_PLACE[kind](packed_copy / name, outside)
    with pytest.raises((ValueError, OSError)) as error:
        load_quantized(packed_copy)
    assert "\n" not in str(error.value)


def test_a_snapshot_of_the_hub_opens(packed: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    for i, file in enumerate(sorted(f for f in packed.rglob("*") if f.is_file())):
        shutil.copy(file, cache / "blobs" / str(i))
        place = snapshot / file.relative_to(packed)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(cache / "blobs" / str(i), place.parent))
    load_quantized(snapshot, verify=True)
    UNet2DModel.from_pretrained(snapshot / "unet")


def test_diffusers_itself_refuses_packed_weights_that_lie_elsewhere(packed_copy: Path) -> None:
    shutil.move(packed_copy / WEIGHTS, packed_copy.parent / "outside")
    (packed_copy / WEIGHTS).symlink_to(packed_copy.parent / "outside")
    with pytest.raises(ValueError, match="leads out of"):
        UNet2DModel.from_pretrained(packed_copy / "unet")


def test_a_model_in_full_precision_may_be_links_but_no_pipe(tmp_path: Path) -> None:
    model = Path(save_tiny(tmp_path / "tiny"))
    shutil.move(model / WEIGHTS, tmp_path / "weights")
    (model / WEIGHTS).symlink_to(tmp_path / "weights")
    assert isinstance(load_pipeline(model), DDPMPipeline)
    (model / WEIGHTS).unlink()
    os.mkfifo(model / WEIGHTS)
    with pytest.raises(ValueError, match="is a pipe"):
        load_pipeline(model)
