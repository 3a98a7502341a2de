"""Nothing that was not written here is ever replaced, and places are looked at before a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from models import CHECKOUT, fit_arguments, run_fpq, save_tiny, tiny_pipeline
from torch import ones

from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.calibration.disk import load_calibration_set, save_calibration_set
from fpq_lightning.storage.pipeline import save_quantized
from fpq_lightning.training.run_directory import RunDirectory
from fpq_lightning.utils.files import atomic_directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def _contents(root: Path) -> dict[str, bytes | None]:
    return {str(f.relative_to(root)): f.read_bytes() if f.is_file() else None for f in root.rglob("*")}


def _file(place: Path) -> None:
    place.write_text("my thesis")


def _directory(place: Path) -> None:
    (place / "chapters").mkdir(parents=True)
    (place / "chapters" / "one.txt").write_text("my thesis")


def _hidden(place: Path) -> None:
    place.mkdir()
    (place / ".thesis").write_text("my thesis")


FOREIGN = {"a file": _file, "a directory": _directory, "a hidden file in a directory": _hidden}


WRITERS: dict[str, Callable[[Path], None]] = {
    "set": lambda place: save_calibration_set(CalibrationSet({"x": ones(2, 3)}, ones(2)), place),
    "pipeline": lambda place: save_quantized(tiny_pipeline(), place, {}),
}

# --- what is not ours ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("what", WRITERS)
def test_a_writer_leaves_what_is_not_ours_as_it_is(kind: str, what: str, tmp_path: Path) -> None:
    FOREIGN[kind](tmp_path / "place")
    before = _contents(tmp_path)
    with pytest.raises(ValueError, match=r"place.* was not written by fpq_lightning"):
        WRITERS[what](tmp_path / "place")
    assert _contents(tmp_path) == before


def test_a_set_replaces_a_set_and_an_empty_directory_but_no_pipeline(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for n in (2, 3):
        save_calibration_set(CalibrationSet({"x": ones(n, 3)}, ones(n)), tmp_path / "set")
        assert len(load_calibration_set(tmp_path / "set")) == n
    with pytest.raises(ValueError, match="was not written"):
        save_quantized(tiny_pipeline(), tmp_path / "set", {})
    save_tiny(tmp_path / "model")
    with pytest.raises(ValueError, match="was not written"):
        save_calibration_set(CalibrationSet({"x": ones(2, 3)}, ones(2)), tmp_path / "model")


def test_a_link_to_a_directory_stays_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with atomic_directory(tmp_path / "link") as temporary:
        (temporary / "new").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert _contents(tmp_path / "disk") == {"new": b"new"}


OPTIONS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a file for the set": ("data.directory", _file),
    "a directory for the set": ("data.directory", _directory),
    "a model for the set": ("data.directory", lambda place: save_tiny(place) and None),
    "a file for activations": ("data.store_directory", _file),
    "a file for images": ("evaluation.images", _file),
    "a file for the run": ("run_dir", _file),
    "a directory for the run": ("run_dir", _directory),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_place_that_is_taken_is_refused_before_the_run(
    case: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option, occupy = OPTIONS[case]
    occupy(tmp_path / "place")
    before = _contents(tmp_path)
    arguments = [*fit_arguments(model, tmp_path / "run", n_images=2), f"--{option}={tmp_path / 'place'}"]
    outcome = run_fpq(capsys, arguments)
    assert outcome.code == 1
    assert len(outcome.errors) == 1, outcome.err
    assert option in outcome.errors[0]
    assert str(tmp_path / "place") in outcome.errors[0]
    assert "rehearsed" not in outcome.out
    assert _contents(tmp_path) == before


@pytest.mark.parametrize("name", ["quantized", "calibration"])
def test_a_run_leaves_alone_what_others_put_into_its_directory(name: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", {"a": 1})
    with run.working():
        pass
    _directory(run.activations)
    with run.working():
        pass
    assert (run.activations / "chapters" / "one.txt").is_file()
    _directory(run.path / name)
    before = _contents(run.path)
    with pytest.raises(ValueError, match=rf"{name}.* was not written by fpq_lightning.*--run_dir"):
        run.state()
    assert _contents(run.path) == before


def test_a_directory_with_a_fingerprint_of_something_else_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "fingerprint.json").write_text('["thumb", "index"]')
    with pytest.raises(ValueError, match="no run of ours"):
        RunDirectory(tmp_path, {"a": 1}).state()


@pytest.mark.parametrize("name", ["report.md", "report.json", "samples.png"])
def test_a_test_replaces_no_reports_of_others(
    name: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("{}")
    (tmp_path / "other.txt").write_text("may be beside a report")
    before = _contents(tmp_path)
    arguments = ["test", f"--model={model}", "--evaluation.n_images=2", "--trainer.accelerator=cpu"]
    outcome = run_fpq(capsys, [*arguments, f"--output={tmp_path}"])
    assert outcome.code == 1
    assert len(outcome.errors) == 1, outcome.err
    assert f"{tmp_path / name} was not written by fpq_lightning" in outcome.errors[0]
    assert _contents(tmp_path) == before


def test_a_study_replaces_no_table_of_others(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.md").write_text("| my | table |")
    before = _contents(tmp_path / "out")
    study = {"model": model, "output": str(tmp_path / "out"), "scratch": str(tmp_path / "scratch")}
    study["rows"] = {"fp32": {"variants": ["full_precision"]}}  # type: ignore[assignment]
    study["evaluation"] = {"n_images": 2, "features": str(CHECKOUT / "data" / "cifar10-features")}  # type: ignore[assignment]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    outcome = run_fpq(capsys, ["study", f"--config={tmp_path / 'study.yaml'}"])
    assert outcome.code == 1
    assert len(outcome.errors) == 1, outcome.err
    assert "table.md was not written by fpq_lightning" in outcome.errors[0]
    assert _contents(tmp_path / "out") == before
