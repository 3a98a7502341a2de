"""Kept images, real images, and the evaluation that uses both."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from models import tiny_pipeline
from PIL import Image
from torch import Tensor, nn

from fpq_lightning.diffusion.images import (
    ImageDirectory,
    from_bytes,
    load_images,
    load_png,
    read_images,
    save_png,
    to_bytes,
)
from fpq_lightning.diffusion.sampling import SamplerConfig, sample, set_sampler
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.evaluation.evaluator import Evaluator
from fpq_lightning.evaluation.metrics.frechet import FrechetDistance
from fpq_lightning.evaluation.networks.cifar10 import CIFAR10Network
from fpq_lightning.evaluation.sampling import image_settings, sample_images, sample_variant
from fpq_lightning.formats.numbers import parse_format
from fpq_lightning.nn.calibrated import LayerQuantization
from fpq_lightning.nn.convert import make_quantized
from fpq_lightning.nn.hashing import hash_quantization
from fpq_lightning.quantization.quantizer import Granularity, Quantizer
from fpq_lightning.utils.resources import find_features
from fpq_lightning.utils.tf32 import using_tf32

CPU = torch.device("cpu")
SETTINGS = {"weights": "abc", "sampler": {"steps": 4}}


def _evaluator(**options: Any) -> Evaluator:
    return Evaluator(EvaluationConfig(**options), SamplerConfig())


def _images(n: int, size: int = 6, channels: int = 3) -> Tensor:
    draw = torch.randint(0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(n))
    return from_bytes(draw.to(torch.uint8))


class _Maker:
    """Makes image i from a table and remembers what it was asked for."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.asked: list[list[int]] = []

    def __call__(self, seeds: list[int]) -> Tensor:
        self.asked.append(list(seeds))
        return self.images[seeds]


# --- eight bits ------------------------------------------------------------------------------------------------


def test_every_byte_survives_and_values_between_go_to_the_nearest() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(every)), every)
    values = torch.linspace(-1.3, 1.3, 1001)
    expected = np.rint((values.double().clamp(-1, 1).numpy() + 1) * 127.5)
    assert np.abs(to_bytes(values).numpy().astype(float) - expected).max() <= 1  # ties
    assert (from_bytes(to_bytes(values)) - values.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_hold_images_without_loss(tmp_path: Path, channels: int) -> None:
    (image,) = _images(1, channels=channels)
    save_png(image, tmp_path / "a.png")
    assert torch.equal(load_png(tmp_path / "a.png"), image)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


# --- directories of images -------------------------------------------------------------------------------------


def test_only_missing_images_are_made(tmp_path: Path) -> None:
    make = _Maker(_images(9))
    directory = ImageDirectory(tmp_path / "a", SETTINGS)
    assert torch.equal(directory.complete([2, 3, 4], make), make.images[2:5])
    assert torch.equal(ImageDirectory(tmp_path / "a", SETTINGS).complete([1, 2, 4, 6], make), make.images[[1, 2, 4, 6]])
    assert make.asked == [[2, 3, 4], [1, 6]]


def test_images_made_otherwise_are_refused_and_the_difference_named(tmp_path: Path) -> None:
    ImageDirectory(tmp_path, SETTINGS).complete([0], _Maker(_images(1)))
    with pytest.raises(ValueError, match=r"made with other settings \(sampler\.steps: 4 -> 5\)"):
        ImageDirectory(tmp_path, {"weights": "abc", "sampler": {"steps": 5}})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"without settings\.json"):
        ImageDirectory(tmp_path, SETTINGS)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    directory = ImageDirectory(tmp_path, SETTINGS)
    directory.complete([3], _Maker(_images(5)))
    directory.file(3).write_bytes(directory.file(3).read_bytes()[:40])
    with pytest.raises(ValueError, match=r"000003\.png cannot be read .*: delete it"):
        directory.complete([3], _Maker(_images(5)))


def test_a_flipped_bit_and_another_seeds_image_are_named(tmp_path: Path) -> None:
    directory, make = ImageDirectory(tmp_path, SETTINGS), _Maker(_images(5))
    directory.complete([3, 4], make)
    third, fourth = directory.file(3), directory.file(4)
    assert torch.equal(load_png(third), make.images[3])
    contents = third.read_bytes()
    for damaged in (contents[:50] + bytes([contents[50] ^ 4]) + contents[51:], fourth.read_bytes()):
        third.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"000003\.png cannot be read \(it is not what was written\): delete it"):
            directory.complete([3, 4], make)


def test_an_image_that_lost_its_digest_is_named_unless_it_is_whole(tmp_path: Path) -> None:
    directory, make = ImageDirectory(tmp_path, SETTINGS), _Maker(_images(5))
    directory.complete([3], make)
    contents = directory.file(3).read_bytes()
    whole = contents[: contents.index(b"IEND") + 8]
    for damaged in (contents[:-20] + bytes(20), contents[:-60] + bytes(60), whole + b"\0"):
        directory.file(3).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"000003\.png cannot be read .*: delete it"):
            directory.complete([3], make)
    directory.file(3).write_bytes(whole)  # of an older version
    assert torch.equal(directory.complete([3], make), make.images[3:4])


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    ImageDirectory(tmp_path, SETTINGS).complete([0, 1, 2, 3], _Maker(_images(4)))
    save_png(torch.zeros(3, 4, 6), tmp_path / "000002.png")
    for seeds in ([0, 1, 2], [2, 4]):  # among others that are kept, and beside one that is made
        with pytest.raises(ValueError, match=r"000002\.png is of another size .*\[3, 4, 6\].*: delete it"):
            ImageDirectory(tmp_path, SETTINGS).complete(seeds, _Maker(_images(5)))
    directory = ImageDirectory(tmp_path, SETTINGS)
    directory.complete([0, 1], _Maker(_images(4)))
    with pytest.raises(ValueError, match=r"000002\.png is of another size"):  # in another batch
        directory.complete([2], _Maker(_images(4)))


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "directory"])
def test_what_is_no_file_in_place_of_an_image_or_its_settings_is_refused(tmp_path: Path, make: Any) -> None:
    directory = ImageDirectory(tmp_path, SETTINGS)
    directory.complete([0], _Maker(_images(1)))
    for name in ("000000.png", "settings.json"):
        (tmp_path / name).unlink()
        make(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} (cannot be read|is a)"):
            ImageDirectory(tmp_path, SETTINGS).complete([0], _Maker(_images(1)))


def test_images_that_are_not_finite_are_handed_on_and_not_kept(tmp_path: Path) -> None:
    images = _images(3).clone()
    images[1, 0, 0, 0] = torch.nan
    directory = ImageDirectory(tmp_path, SETTINGS)
    found = directory.complete([0, 1, 2], _Maker(images))
    assert not found[1].isfinite().all()
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["000000.png", "000002.png"]


def test_settings_of_images_know_the_model_and_the_sampler_but_not_the_batch() -> None:
    settings = [
        image_settings("a", SamplerConfig(batch_size=3)),
        image_settings("a", SamplerConfig(batch_size=5)),
        image_settings("b", SamplerConfig(batch_size=3)),
        image_settings("a", SamplerConfig(steps=7)),
        image_settings("a", SamplerConfig(), "run, quantized"),
    ]
    assert settings[0] == settings[1]
    assert all(other != settings[0] for other in settings[2:])


def test_a_variant_that_was_stopped_goes_on_with_the_same_images(tmp_path: Path) -> None:
    pipeline, sampler = tiny_pipeline(), SamplerConfig(steps=3, batch_size=2)
    whole = sample_variant(pipeline, sampler, range(7), "full_precision")
    directory = ImageDirectory(tmp_path, SETTINGS)
    sample_variant(pipeline, sampler, range(3), "full_precision", directory=directory)
    again = sample_variant(pipeline, sampler, range(7), "full_precision", directory=directory)
    assert (again - whole).abs().max() <= 2 / 255 + 1e-6
    assert torch.equal(again, torch.stack([load_png(directory.file(i)) for i in range(7)]))


def test_sampled_images_have_eight_bits_and_products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, sampler = tiny_pipeline(), SamplerConfig(steps=3, batch_size=4)
    set_sampler(pipeline, sampler)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen: list[bool] = []
    handle = pipeline.unet.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    found = sample_images(pipeline, sampler, range(4))
    handle.remove()
    assert seen == [False] * 3
    assert torch.backends.cudnn.allow_tf32
    exact = sample(pipeline, sampler, range(4))
    assert torch.equal(found, from_bytes(to_bytes(exact)))
    assert not torch.equal(found, exact)


def test_tf32_is_as_before_when_the_work_fails() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with pytest.raises(ZeroDivisionError), using_tf32(False):
            1 / torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# --- real images -----------------------------------------------------------------------------------------------


def _folder(directory: Path, n: int = 9, size: int = 32) -> Path:
    directory.mkdir()
    for i, image in enumerate(_images(n, size)):
        save_png(image, directory / f"{i}.png")
    return directory


def test_real_images_come_from_folders_parquet_files_and_datasets(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "folder")
    expected = _images(9, 32)
    dataset = load_images(str(folder), "image")
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(str(tmp_path / "disk"))
    for source in (folder, tmp_path / "a.parquet", tmp_path / "disk"):
        opened = load_images(str(source), "image")
        found = list(read_images(opened, "image", range(len(opened)), 4))
        assert [len(batch) for batch in found] == [4, 4, 1]
        assert torch.equal(torch.cat(found), expected)


def test_real_images_of_several_sizes_come_in_batches_of_one(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "folder", 4, 8)
    save_png(_images(1, 5)[0], folder / "1.png")
    dataset = load_images(str(folder), "image")
    assert [tuple(b.shape) for b in read_images(dataset, "image", range(4), 9)] == [
        (1, 3, 8, 8),
        (1, 3, 5, 5),
        (2, 3, 8, 8),
    ]


def test_real_images_are_described_without_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    evaluator = _evaluator(n_images=8, real=str(_folder(tmp_path / "folder")))
    (network,) = evaluator.networks.values()
    describe, seen = network.describe, []

    def noting(images: Tensor) -> dict[str, Tensor]:
        seen.append(torch.backends.cudnn.allow_tf32)
        return describe(images)

    network.describe = noting
    evaluator.metrics(CPU)
    assert seen
    assert not any(seen)


def _with_a_corrupt_image(directory: Path) -> Path:
    folder = _folder(directory)
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    return folder


def test_a_corrupt_real_image_is_named(tmp_path: Path) -> None:
    evaluator = _evaluator(n_images=8, real=str(_with_a_corrupt_image(tmp_path / "folder")))
    with pytest.raises(ValueError, match=r"image 3 of the real ones cannot be read .*--evaluation\.corrupt skip"):
        evaluator.metrics(CPU)


def test_a_corrupt_real_image_is_skipped_and_counted_if_asked(tmp_path: Path) -> None:
    folder = _with_a_corrupt_image(tmp_path / "folder")
    evaluator = _evaluator(n_images=8, real=str(folder), corrupt="skip")
    with pytest.warns(UserWarning, match="1 real images cannot be read and were skipped: 3"):
        metrics = evaluator.metrics(CPU)
    real = torch.cat([_images(9, 32)[:3], _images(9, 32)[4:]])
    images = _images(5, 32)
    metrics.update(images, images)
    network = CIFAR10Network.load(find_features("cifar10-features"))
    expected = FrechetDistance(network.num_features)
    expected.update(network(images), real=False)
    expected.update(network(real), real=True)
    assert metrics.compute()["fd_real"] == pytest.approx(expected.compute().item(), rel=1e-4)


def test_real_images_are_read_once_for_all_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = _evaluator(n_images=8, real=str(_folder(tmp_path / "folder")), n_real=5)
    first = evaluator.metrics(CPU)
    monkeypatch.setattr("fpq_lightning.evaluation.evaluator.read_images", None)
    second = evaluator.metrics(CPU)
    found = []
    for metrics in (first, second):
        metrics.update(_images(5, 32), _images(6, 32)[:5])
        found.append(metrics.compute())
    assert found[0] == found[1]
    assert found[0]["kid_real"] is not None


@pytest.mark.parametrize(
    ("real", "column", "error", "message"),
    [("none/such/folder", "image", FileNotFoundError, "no dataset"), ("folder", "picture", ValueError, "no column")],
)
def test_real_images_that_are_not_there_are_found_before_the_run(
    tmp_path: Path, real: str, column: str, error: type[Exception], message: str
) -> None:
    _folder(tmp_path / "folder")
    with pytest.raises(error, match=message):
        _evaluator(real=str(tmp_path / real), real_column=column).check()


def test_fewer_images_than_features_are_said_with_the_number() -> None:
    with pytest.warns(UserWarning, match=r"64 images are too few .* 256 features .* \(at least 257\)"):
        _evaluator(n_images=64).check()


def test_enough_images_are_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    _evaluator(n_images=257).check()
    assert not recwarn.list


def test_metrics_without_their_packages_are_left_out_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpq_lightning.evaluation.networks.inception._TORCH_FIDELITY_AVAILABLE", False)
    monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", False)
    evaluator = _evaluator(n_images=8, inception="auto", lpips="alex")
    with pytest.warns(UserWarning, match="left out") as found:
        metrics = evaluator.metrics(CPU)
    messages = [str(warning.message) for warning in found]
    assert any("Inception" in m and "fpq-lightning[fid]" in m for m in messages)
    assert any("LPIPS" in m and "torchvision" in m for m in messages)
    assert all("\n" not in m for m in messages)
    metrics.update(_images(4, 32), _images(5, 32)[:4])
    names = metrics.compute().keys()
    assert "fd" in names
    assert not {"lpips", "fid", "is_inception"} & names


def test_settings_lie_beside_the_images(tmp_path: Path) -> None:
    ImageDirectory(tmp_path, SETTINGS).complete([0], _Maker(_images(1)))
    found: dict[str, Any] = json.loads((tmp_path / "settings.json").read_text())
    assert found == SETTINGS
    with Image.open(tmp_path / "000000.png") as image:
        assert image.size == (6, 6)


def test_a_dataset_of_other_things_than_images_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"image": [1, 2, 3]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="image 0 of the real ones cannot be read"):
        _evaluator(n_images=8, real=str(tmp_path / "a.parquet")).metrics(CPU)


def test_a_quantization_that_differs_in_one_code_has_images_of_its_own() -> None:
    layer = make_quantized(nn.Linear(4, 3).requires_grad_(False), Granularity("channel"))
    model = nn.Sequential(layer)
    quantizer = Quantizer(parse_format("e2m1"), torch.ones(3, 1))
    layer.variants["quantized"] = LayerQuantization([quantizer])
    nearest = hash_quantization(model, "quantized")
    hashes = {nearest}
    for code in (1, 2):
        variant = LayerQuantization([quantizer])
        variant.codes = [torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 0, code]], dtype=torch.uint8)]
        layer.variants["quantized"] = variant
        hashes.add(hash_quantization(model, "quantized"))
        assert hash_quantization(model, "quantized") in hashes
    layer.variants["quantized"] = LayerQuantization([Quantizer(parse_format("e1m2"), torch.ones(3, 1))])
    hashes.add(hash_quantization(model, "quantized"))
    assert len(hashes) == 4
    assert hash_quantization(model, "nearest") not in hashes
