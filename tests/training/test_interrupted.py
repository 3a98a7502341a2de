"""Runs that are interrupted, or whose result is damaged, end in one line, and go on."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from models import fit_arguments, quantized_files, run_fpq, save_tiny, tiny_pipeline

import fpq_lightning as fpq
from fpq_lightning.calibration.store import STORE, ActivationStore
from fpq_lightning.reconstruction.unit import UnitTrainer
from fpq_lightning.training import rehearsal
from fpq_lightning.training.callbacks import finalize, image_quality
from fpq_lightning.training.datamodule import CalibrationDataModule
from fpq_lightning.training.module import BlockReconstruction
from fpq_lightning.training.run_directory import RunDirectory
from fpq_lightning.utils.files import atomic_directory, write_json
from fpq_lightning.utils.temporary import PREFIX, in_use, remove_leftovers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fpq_lightning.cli import main

    run = tmp_path_factory.mktemp("run") / "run"
    main([*fit_arguments(model, run, iterations=2, n_images=2), *_FEW])
    return run


_FEW = ["--recipe.include=['conv_in','mid_block.resnets.0.*']", "--evaluation.features=null"]


def _assert_one_line(outcome: Any, *messages: str) -> None:
    assert outcome.code == 1, outcome.err
    assert len(outcome.errors) == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert [m for m in messages if m not in outcome.errors[0]] == [], outcome.errors[0]


# --- Ctrl-C ----------------------------------------------------------------------------------------------------

PHASES: dict[str, tuple[Any, str]] = {
    "rehearsal": (rehearsal._SmallRun, "_trace"),
    "sampling": (CalibrationDataModule, "make_set"),
    "tracing": (BlockReconstruction, "_find_units"),
    "capture": (BlockReconstruction, "_begin_unit"),
    "learning": (UnitTrainer, "train"),
    "writing": (finalize, "save_quantized"),
    "evaluation": (image_quality, "sample_variant"),
}


@pytest.fixture
def undisturbed() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    yield
    after = signal.signal(signal.SIGINT, before)
    assert after is signal.default_int_handler


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize("phase", [pytest.param("rehearsal", marks=pytest.mark.rehearsed), *list(PHASES)[1:]])
def test_ctrl_c_ends_a_run_in_any_phase_with_one_line_and_it_goes_on(
    phase: str, model: str, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments = [*fit_arguments(model, tmp_path / "run", iterations=2, n_images=2), *_FEW]
    owner, name = PHASES[phase]
    original: Callable[..., Any] = getattr(owner, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        outcome = run_fpq(capfd, arguments)
    assert outcome.code == 128 + signal.SIGINT, outcome.err
    assert "Traceback" not in outcome.err
    lines = [line for line in (outcome.out + outcome.err).splitlines() if "go on with --ckpt_path last" in line]
    assert len(lines) == 1
    assert not (tmp_path / "run" / "report.json").exists()
    outcome = run_fpq(capfd, [*arguments, "--ckpt_path=last"])
    assert outcome.code == 0, outcome.err
    assert quantized_files(tmp_path / "run") == quantized_files(finished)
    assert list((tmp_path / "run").glob(".*")) == []


# --- damaged results -------------------------------------------------------------------------------------------


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _emptied(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no files": ("quantized", _emptied),
    "half the weights": ("quantized/unet/diffusion_pytorch_model.safetensors", _cut),
    "half a report": ("report.json", _cut),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_result_is_not_called_finished_and_is_written_again(
    name: str, model: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, damage = DAMAGES[name]
    run = shutil.copytree(finished, tmp_path / "run")
    damage(run / place)
    arguments = [*fit_arguments(model, run, iterations=2, n_images=2), *_FEW]
    _assert_one_line(run_fpq(capsys, arguments), place, "--ckpt_path last")
    outcome = run_fpq(capsys, [*arguments, "--ckpt_path=last"])
    assert outcome.code == 0, outcome.err
    assert "written again" in outcome.err
    assert quantized_files(run) == quantized_files(finished)
    assert "is finished" in run_fpq(capsys, arguments).out


# --- what killed processes leave -------------------------------------------------------------------------------


def test_leftovers_go_and_what_is_in_use_stays(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}report-1.json").write_text("{")
    (tmp_path / f"{PREFIX}quantized-x" / "unet").mkdir(parents=True)
    (tmp_path / ".hidden").write_text("somebody's")
    used = tmp_path / f"{PREFIX}used-1.json"
    used.touch()
    with in_use(used):
        remove_leftovers(tmp_path)
        assert {f.name for f in tmp_path.iterdir()} == {used.name, ".hidden"}
    remove_leftovers(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {".hidden"}
    remove_leftovers(tmp_path / "none")


def test_writers_keep_what_they_are_writing(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "set") as temporary:
        write_json(temporary / "a.json", 1)
        remove_leftovers(tmp_path)
        assert temporary.is_dir()
    assert [f.name for f in tmp_path.iterdir()] == ["set"]


def test_a_run_begins_without_what_killed_ones_left(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", {"a": 1})
    with run.working():
        pass
    left = [run.path, run.checkpoints / "units", run.images / "full_precision", run.path / "activations"]
    for place in left:
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{STORE if place.name == 'activations' else PREFIX}samples-1.png").write_text("half")
    with run.working():
        assert [f.name for f in run.path.rglob("*") if "samples" in f.name] == []


def test_stores_remove_the_files_of_killed_runs_and_leave_those_of_others(tmp_path: Path) -> None:
    (tmp_path / f"{STORE}killed").mkdir()
    stores = [ActivationStore(torch.device("cpu"), budget=0, directory=tmp_path) for _ in range(2)]
    for store in stores:
        store.allocate("x", (2, 3), torch.float32, 0)
        store.write("x", 0, torch.ones(2, 3))
    assert len(list(tmp_path.iterdir())) == 2
    assert all(bool((store.read("x", slice(0, 2)) == 1).all()) for store in stores)
    for store in stores:
        store.close()
    assert list(tmp_path.iterdir()) == []


# --- threads ---------------------------------------------------------------------------------------------------


def test_two_threads_quantize_two_models_as_one_would(tmp_path: Path) -> None:
    def quantize(name: str) -> torch.Tensor:
        recipe = fpq.Recipe(rounding=fpq.RoundingRecipe("nearest"), include=["conv_in"])
        data = CalibrationDataModule(n_samples=8, n_search=4, micro_batch=4)
        sampler = fpq.SamplerConfig(steps=2, batch_size=4)
        pipeline = pipelines[name]
        barrier.wait()
        fpq.quantize(pipeline, recipe, tmp_path / name, data, sampler, accelerator="cpu", enable_progress_bar=False)
        return pipeline.unet(torch.ones(1, 3, 8, 8), 3).sample

    pipelines = {name: tiny_pipeline() for name in ("alone", "first", "second")}
    barrier = threading.Barrier(1)
    alone = quantize("alone")
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(quantize, ["first", "second"]))
    assert all(torch.equal(one, alone) for one in found)
