"""A metric that is registered outside of the package appears wherever metrics appear."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from models import STEPS, fit_arguments, save_tiny
from torch import Tensor
from torchmetrics import Metric

from fpq_lightning.cli import main
from fpq_lightning.diffusion.images import load_png
from fpq_lightning.evaluation.metrics import METRICS, Column, ImageMetric, find_weights
from fpq_lightning.training.run_directory import RunDirectory
from fpq_lightning.training.summary import run_summary


class _Brightness(Metric):
    """Mean of all pixels, which are in [-1, 1]."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        self.total += images.double().sum()
        self.count += images.numel()

    def compute(self) -> Tensor:
        return self.total / self.count


@pytest.fixture(scope="module", autouse=True)
def brightness() -> Iterator[ImageMetric]:
    metric = ImageMetric(
        name="brightness",
        help="Mean of all pixels.",
        columns=(Column("brightness", "brightness", 1, scale=100, unit="%", headline=True),),
        inputs=("images",),
        make=lambda config: _Brightness(),
        weights=lambda: {"brightness": Path("/none")},
        note=lambda n_images: f"Brightness is the mean over {n_images} images.",
    )
    with METRICS.temporarily(metric):
        yield metric


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def run(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "run"
    main(fit_arguments(model, directory, iterations=2, n_images=2))
    return directory


def _mean(images: Path) -> float:
    return torch.stack([load_png(file) for file in sorted(images.glob("*.png"))[:2]]).double().mean().item()


def _cells(line: str) -> list[str]:
    return line.strip("| ").split(" | ")


def test_fit_reports_it(run: Path) -> None:
    variants = json.loads((run / "report.json").read_text())["variants"]
    assert variants["full_precision"]["brightness"] == pytest.approx(_mean(run / "images" / "full_precision"), abs=1e-6)
    (quantized,) = (run / "images").glob("quantized-*")
    assert variants["quantized"]["brightness"] == pytest.approx(_mean(quantized), abs=1e-6)
    text = (run / "report.md").read_text()
    header, _, *rows = (_cells(line) for line in text[text.index("| variant |") :].splitlines()[:5])
    assert header[-2] == "brightness %"  # after those of the package
    assert [row[-2] for row in rows] == [f"{100 * values['brightness']:.1f}" for values in variants.values()]
    assert "Brightness is the mean over 2 images." in text
    page = (run / "report.html").read_text()
    assert '<th title="Mean of all pixels.">brightness %</th>' in page
    (quality,) = (line for line in run_summary(RunDirectory(run, {}), 1) if line.startswith("quality:"))
    assert f", brightness {100 * variants['quantized']['brightness']:.1f} %" in quality


def test_test_reports_it_with_and_without_a_reference(model: str, run: Path, tmp_path: Path) -> None:
    for name, tested in (("quantized", str(run / "quantized")), ("images", model)):
        output = tmp_path / name
        options = [f"--sampler.steps={STEPS}", "--evaluation.n_images=2", "--trainer.accelerator=cpu"]
        main(["test", f"--model={tested}", f"--output={output}", *options])
        found = json.loads((output / "report.json").read_text())["variants"][name]
        assert found["brightness"] == pytest.approx(_mean(output / "images" / name), abs=1e-6)
        assert (found["psnr"] is None) == (name == "images")
        assert "| brightness % |" in (output / "report.md").read_text()


def test_a_study_has_its_column_and_its_figure(model: str, tmp_path: Path) -> None:
    study = {
        "model": model,
        "output": str(tmp_path / "study"),
        "scratch": str(tmp_path / "scratch"),
        "sampler": {"steps": STEPS, "batch_size": 4},
        "evaluation": {"n_images": 2},
        "rows": {"fp32": {"variants": ["full_precision", "other_seeds"]}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    main(["study", "--config", str(tmp_path / "study.yaml")])
    (row, _) = csv.DictReader((tmp_path / "study" / "table.csv").open())
    (scratch,) = (tmp_path / "scratch").iterdir()
    assert float(row["brightness"]) == pytest.approx(_mean(scratch / "full_precision"), abs=1e-6)
    assert "brightness % |" in (tmp_path / "study" / "table.md").read_text()
    assert (tmp_path / "study" / "quality_brightness.png").is_file()


def test_doctor_lists_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert find_weights()["brightness"] == Path("/none")
    main(["doctor"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["brightness"])
    assert line.split()[1] == "/none"


def test_a_name_is_taken_once(brightness: ImageMetric) -> None:
    with pytest.raises(ValueError, match="metric 'brightness' is registered already"):
        METRICS.register(brightness)
