"""A pipeline of which files are missing or cut off is told from a whole one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from models import save_tiny, tiny_pipeline

from fpq_lightning.storage.complete import check_complete


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _emptied(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


_WEIGHTS = "diffusion_pytorch_model.safetensors"

DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "nothing is there": ("", _emptied, "model_index.json"),
    "no index": ("model_index.json", Path.unlink, "model_index.json"),
    "half an index": ("model_index.json", _cut, "model_index.json"),
    "no component": ("unet", shutil.rmtree, "unet"),
    "an empty component": ("scheduler", _emptied, "scheduler"),
    "half a configuration": ("unet/config.json", _cut, "config.json"),
    "no weights": (f"unet/{_WEIGHTS}", Path.unlink, "unet has no weights"),
    "half the weights": (f"unet/{_WEIGHTS}", _cut, "truncated"),
    "empty weights": (f"unet/{_WEIGHTS}", lambda file: file.write_bytes(b""), "damaged"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny(tmp_path_factory.mktemp("model") / "tiny"))


def test_a_whole_pipeline_is_complete(whole: Path) -> None:
    check_complete(whole)


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_missing_or_cut_off_is_named(name: str, whole: Path, tmp_path: Path) -> None:
    place, damage, message = DAMAGES[name]
    copy = shutil.copytree(whole, tmp_path / "copy")
    damage(copy / place)
    with pytest.raises(ValueError, match=message):
        check_complete(copy)


def test_every_shard_that_an_index_names_must_be_there(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path, max_shard_size="10KB")
    check_complete(tmp_path)
    index = next((tmp_path / "unet").glob("*.index.json"))
    shard = next(iter(json.loads(index.read_text())["weight_map"].values()))
    (tmp_path / "unet" / shard).unlink()
    with pytest.raises(ValueError, match=f"{shard} is missing"):
        check_complete(tmp_path)
