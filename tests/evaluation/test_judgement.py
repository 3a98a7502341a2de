"""A run's images and figures, from its files, against images sampled and compared by hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from models import STEPS, Outcome, run_fpq, save_tiny, tiny_pipeline
from PIL import Image
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from fpq_lightning import (
    CalibrationDataModule,
    EvaluationConfig,
    Recipe,
    RoundingRecipe,
    SamplerConfig,
    WeightRecipe,
    load_quantized,
    quantize,
)

SEED, N = 100, 5
SEEDS = range(SEED, SEED + N)
# Titles of columns and rows in report.md.
UNIT, NEAREST, QUANTIZED, ROUNDING = "unit", "nearest", "quantized", "rounding"
VARIANTS = {"nearest": "nearest", "quantized": "quantized"}  # how the row of a variant begins

METRICS = PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
Flags = list[tuple[str, bool, bool]]


@dataclass
class Judged:
    """A finished run with images, and where TF32 stood while they were compared."""

    directory: Path
    flags: Flags

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.directory / "report.json").read_text())

    def images(self, variant: str) -> dict[int, np.ndarray]:
        """Those that the run kept, by seed, `[height, width, 3]` of bytes."""
        (directory,) = (self.directory / "images").glob(f"{variant}*")
        return read_images(directory)


def read_images(directory: Path) -> dict[int, np.ndarray]:
    return {int(file.stem): np.array(Image.open(file)) for file in sorted(directory.glob("*.png"))}


def sample_by_hand(pipeline: DDPMPipeline, seed: int) -> np.ndarray:
    """One image of a seed, in bytes, by diffusers alone."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    generator = torch.Generator("cpu").manual_seed(seed)
    image = pipeline(generator=generator, num_inference_steps=STEPS, output_type="np").images[0]
    return (image * 255).round().astype(np.uint8)


def assert_without_tf32(flags: Flags) -> None:
    assert {name for name, *_ in flags} == {metric.__name__ for metric in METRICS}  # all were watched
    assert not any(matmul or cudnn for _, matmul, cudnn in flags)


@contextmanager
def recorded_flags() -> Iterator[Flags]:
    """Allows TF32, and notes whether it still is whenever images are compared."""
    found: Flags = []
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]

    def watch(patch: pytest.MonkeyPatch, metric: type) -> None:
        update = metric.update

        def noting(self: Any, *args: Any) -> None:
            found.append((metric.__name__, *(backend.allow_tf32 for backend in backends)))
            update(self, *args)

        patch.setattr(metric, "update", noting)

    for backend in backends:
        backend.allow_tf32 = True
    try:
        with pytest.MonkeyPatch.context() as patch:
            for metric in METRICS:
                watch(patch, metric)
            yield found
        assert all(backend.allow_tf32 for backend in backends)  # as it was
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, model: str) -> Judged:
    directory = tmp_path_factory.mktemp("judged") / "run"
    with recorded_flags() as flags:
        quantize(
            tiny_pipeline(),
            Recipe(
                WeightRecipe("fp4"), rounding=RoundingRecipe(start="nearest", learned=True, iterations=20, batch_size=4)
            ),
            directory,
            CalibrationDataModule(n_samples=16, n_search=8),
            SamplerConfig("DDIMScheduler", steps=STEPS, batch_size=2),
            EvaluationConfig(n_images=N, seed=SEED),
            base_model=model,
            accelerator="cpu",
        )
    return Judged(directory, flags)


# --- seeds -----------------------------------------------------------------------------------------------------


def test_image_i_of_a_variant_is_that_of_seed_plus_i(judged: Judged) -> None:
    pipelines = {"full_precision": tiny_pipeline(), "quantized": load_quantized(judged.directory / "quantized")}
    for variant, pipeline in pipelines.items():
        pipeline.set_progress_bar_config(disable=True)
        found = judged.images(variant)
        assert list(found)[:N] == list(SEEDS)
        for seed in SEEDS:
            difference = np.abs(found[seed].astype(int) - sample_by_hand(pipeline, seed))
            assert np.median(difference) == 0  # batches change the last bits of products, and so a level here and there
            assert (difference > 3).mean() < 0.05
    assert list(judged.images("nearest")) == list(judged.images("quantized")) == list(SEEDS)


def test_the_noise_floor_is_of_full_precision_images_of_the_seeds_that_follow(judged: Judged) -> None:
    assert list(judged.images("full_precision")) == list(range(SEED, SEED + 2 * N))
    assert judged.report["variants"]["full_precision"]["psnr"] is None


def test_reported_seeds_are_those_of_the_images(judged: Judged) -> None:
    assert {tuple(v["seeds"]) for v in judged.report["variants"].values()} == {(SEED, SEED + N - 1)}


def _psnr(images: dict[int, np.ndarray], reference: dict[int, np.ndarray], shift: int = 0) -> float:
    errors = [((images[s] / 127.5 - reference[s + shift] / 127.5) ** 2).mean() for s in SEEDS]
    return float(np.mean([10 * math.log10(4 / error) for error in errors]))


@pytest.mark.parametrize("variant", ["nearest", "quantized"])
def test_psnr_compares_images_of_equal_seeds(judged: Judged, variant: str) -> None:
    images, reference = judged.images(variant), judged.images("full_precision")
    assert judged.report["variants"][variant]["psnr"] == pytest.approx(_psnr(images, reference), abs=1e-3)
    assert abs(_psnr(images, reference) - _psnr(images, reference, shift=1)) > 1


def _test_command(judged: Judged, directory: Path, capsys: pytest.CaptureFixture[str]) -> Outcome:
    options = {
        "model": judged.directory / "quantized",
        "evaluation.n_images": N,
        "evaluation.seed": SEED,
        "evaluation.images": directory,
        "sampler.scheduler": "DDIMScheduler",
        "sampler.steps": STEPS,
        "sampler.batch_size": 2,
        "trainer.accelerator": "cpu",
    }
    return run_fpq(capsys, ["test", *(f"--{key}={value}" for key, value in options.items())])


def test_the_test_command_judges_the_same_seeds_without_tf32(
    judged: Judged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with recorded_flags() as flags:
        found = _test_command(judged, tmp_path / "images", capsys)
    assert found.code == 0, found.err
    for variant in ("full_precision", "quantized"):
        images, kept = read_images(tmp_path / "images" / variant), judged.images(variant)
        assert list(images) == list(SEEDS)
        assert all((np.abs(images[s].astype(int) - kept[s]) > 3).mean() < 0.05 for s in SEEDS)
    assert_without_tf32(flags)


# --- precision -------------------------------------------------------------------------------------------------


def test_images_are_compared_without_tf32_whatever_the_run_allows(judged: Judged) -> None:
    assert_without_tf32(judged.flags)


# --- report.md -------------------------------------------------------------------------------------------------


def _tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a Markdown file, a dictionary by column title for each row."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


def test_the_columns_of_the_unit_table_hold_what_their_titles_say(judged: Judged) -> None:
    (units,) = [t for t in _tables((judged.directory / "report.md").read_text()) if UNIT in t[0]]
    blocks = judged.report["blocks"]
    assert [row[UNIT] for row in units] == [block["name"] for block in blocks]
    for row, block in zip(units, blocks, strict=True):
        assert float(row[NEAREST]) == pytest.approx(block["error_nearest"], rel=0.01)
        assert float(row[QUANTIZED]) == pytest.approx(block["error_quantized"], rel=0.01)
        assert row[ROUNDING] == block["kept"]
        assert row["parameters"].replace(",", "") == str(block["parameters"])
    assert any(block["error_quantized"] < 0.97 * block["error_nearest"] for block in blocks)  # they are told apart


def test_the_rows_of_the_image_table_hold_what_their_titles_say(judged: Judged) -> None:
    tables = _tables((judged.directory / "report.md").read_text())
    (rows,) = [t for t in tables if "PSNR dB" in t[0]]
    assert abs(_psnr(judged.images("nearest"), judged.images("quantized"))) < 60  # not the same images
    for variant, title in VARIANTS.items():
        (row,) = [row for row in rows if next(iter(row.values())).startswith(title)]
        values = judged.report["variants"][variant]
        assert float(row["PSNR dB"]) == pytest.approx(values["psnr"], abs=0.006)
        assert float(row["SSIM"]) == pytest.approx(values["ssim"], abs=6e-5)
        assert float(row["FD"]) == pytest.approx(values["fd"], abs=6e-4)
        assert row["images"] == str(N)
