"""Checkpoints: killed while one is written, damaged, of another run, on a full disk, and at a signal."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    CHECKOUT,
    Driver,
    Outcome,
    disturbance,
    fit_arguments,
    quantized_files,
    save_tiny,
    scenario,
    tiny_unet,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves

ITERATIONS = 30
LAYERS = "['conv_in','mid_block.resnets.0.*']"  # units 2 and 5 of 12
# Checkpoints: 1 after unit 1, 2 and 3 within unit 2, 4 to 6 after units 2 to 4, 7 and 8 within unit 5.
MID_UNIT = 8
LAST = 12 + 2 * 2

SLURM = {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "fit", "SLURM_JOB_ID": "4711"}
SLURM |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}

Disturbance = dict[str, Any]


@dataclass
class Runs:
    """Runs of one command in directories of their own."""

    root: Path
    model: str
    driver: Driver
    reference: dict[str, bytes] = field(default_factory=dict)

    def arguments(self, name: str, *more: str) -> list[str]:
        options = ["--checkpoint_steps=10", f"--recipe.include={LAYERS}"]
        return [*fit_arguments(self.model, self.root / name, ITERATIONS), *options, *more]

    def fit(self, name: str, *more: str, harm: Disturbance | None = None, **options: Any) -> Outcome:
        return self.driver.run(scenario(self.root / f"{name}-log", self.arguments(name, *more), harm, **options))

    def resume(self, name: str, *more: str, **options: Any) -> Outcome:
        return self.fit(name, "--ckpt_path=last", *more, **options)

    def checkpoint(self, name: str, file: str = "last.ckpt") -> Path:
        return self.root / name / "checkpoints" / file

    def copy(self, name: str, source: str = "interrupted") -> Path:
        return shutil.copytree(self.root / source, self.root / name)

    def assert_as_uninterrupted(self, name: str) -> None:
        """The quantized model has the same bits, and nothing else is left."""
        found = quantized_files(self.root / name)
        assert found.keys() == self.reference.keys()
        assert {file for file in found if found[file] != self.reference[file]} == set()
        assert sorted(f.name for f in (self.root / name / "checkpoints").iterdir()) == [
            "last.ckpt",
            "previous.ckpt",
            "units",
        ]
        hidden = [{f.name for f in (self.root / n).iterdir() if f.name.startswith(".")} for n in (name, "reference")]
        assert hidden[0] == hidden[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    root = tmp_path_factory.mktemp("checkpoint")
    with Driver() as driver:
        runs = Runs(root, save_tiny(root / "model"), driver)
        outcome = runs.fit("reference")
        assert outcome.code == 0, outcome.err
        runs.reference = quantized_files(root / "reference")
        assert runs.reference
        # Killed a step after the second checkpoint within its unit.
        assert runs.fit("interrupted", harm=disturbance("steps", "gradients", ITERATIONS + 21)).code == -signal.SIGKILL
        yield runs


def assert_one_line(outcome: Outcome, *messages: str) -> None:
    assert outcome.code == 1, (outcome.code, outcome.err)
    assert "Traceback" not in outcome.err, outcome.err
    assert len(outcome.errors) == 1, outcome.err
    assert outcome.err.rstrip().splitlines()[-1] == outcome.errors[0]
    assert [m for m in messages if m not in outcome.errors[0]] == [], outcome.errors[0]


# --- killed while a checkpoint is written ----------------------------------------------------------------------

KILLS: dict[str, tuple[Disturbance, set[str]]] = {
    "half of it written": (
        disturbance("trainer", "save_checkpoint", MID_UNIT, halved=True),
        {".last.ckpt", "last.ckpt", "previous.ckpt"},
    ),
    "written but not renamed": (
        disturbance("os", "replace", MID_UNIT - 1, file="previous.ckpt"),
        {".last.ckpt", "last.ckpt", "previous.ckpt"},
    ),
    "the last one made the previous one": (
        disturbance("os", "replace", MID_UNIT, file=".last.ckpt"),
        {".last.ckpt", "previous.ckpt"},
    ),
    "half of the first one written": (disturbance("trainer", "save_checkpoint", 1, halved=True), {".last.ckpt"}),
    "half of the last one written": (
        disturbance("trainer", "save_checkpoint", LAST, halved=True),
        {".last.ckpt", "last.ckpt", "previous.ckpt"},
    ),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_run_killed_while_a_checkpoint_is_written_resumes_to_the_same_bits(runs: Runs, moment: str) -> None:
    harm, left = KILLS[moment]
    name = moment.replace(" ", "-")
    assert runs.fit(name, harm=harm).code == -signal.SIGKILL
    assert {f.name for f in (runs.root / name / "checkpoints").glob("*.ckpt")} == left
    resumed = runs.resume(name)
    assert resumed.code == 0, resumed.err
    assert ("no checkpoint" in resumed.out) == (left == {".last.ckpt"})
    runs.assert_as_uninterrupted(name)


def test_a_run_killed_while_a_checkpoint_is_written_leaves_nothing_outside_its_directory(runs: Runs) -> None:
    elsewhere = runs.root / "elsewhere"
    elsewhere.mkdir()
    # Whatever a file is called before it is moved to the place of a checkpoint.
    runs.fit("moved", harm=disturbance("os", "rename", 2, file=".last.ckpt"), environment={"TMPDIR": str(elsewhere)})
    assert list(elsewhere.iterdir()) == []


def test_a_run_killed_while_it_writes_its_result_leaves_nothing_of_it_once_resumed(runs: Runs) -> None:
    assert runs.fit("writing", harm=disturbance("os", "replace", 1, file="quantized")).code == -signal.SIGKILL
    assert not (runs.root / "writing" / "quantized").exists()
    resumed = runs.resume("writing")
    assert resumed.code == 0, resumed.err
    runs.assert_as_uninterrupted("writing")


def test_activations_on_disk_go_when_a_killed_run_is_resumed(runs: Runs) -> None:
    little = "--data.store_budget=10kB"
    harm = disturbance("steps", "gradients", ITERATIONS + 21)
    assert runs.fit("on-disk", little, harm=harm).code == -signal.SIGKILL
    before = {f.name for f in (runs.root / "on-disk").iterdir()}
    assert before > {f.name for f in (runs.root / "interrupted").iterdir()}, "the activations fitted the budget"
    resumed = runs.resume("on-disk", little)
    assert resumed.code == 0, resumed.err
    assert {f.name for f in (runs.root / "on-disk").iterdir()} == {f.name for f in (runs.root / "reference").iterdir()}
    runs.assert_as_uninterrupted("on-disk")


# --- damaged ---------------------------------------------------------------------------------------------------


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _random(file: Path) -> None:
    file.write_bytes(os.urandom(file.stat().st_size))


def _overwrite(file: Path) -> None:
    """Zeros where the largest tensor was, as lost blocks of a disk leave them."""
    with zipfile.ZipFile(file) as archive:
        entry = max((e for e in archive.infolist() if "/data/" in e.filename), key=lambda e: e.file_size)
        values = archive.read(entry)
    contents = file.read_bytes()
    assert contents.count(values) == 1
    file.write_bytes(contents.replace(values, bytes(len(values))))


def _saved_again(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """What something else has written, whose zip file is in order."""

    def damage(file: Path) -> None:
        checkpoint = torch.load(file, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, file)

    return damage


def _flip_a_moment(checkpoint: dict[str, Any]) -> None:
    moments = [leaf for leaf in tree_leaves(checkpoint["optimizer_states"]) if isinstance(leaf, Tensor) and leaf.ndim]
    moments[0].view(torch.int32).view(-1)[0] ^= 1


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _link_out(file: Path) -> None:
    outside = file.parents[2] / f"outside-of-{file.parents[1].name}"
    shutil.move(file, outside)
    file.symlink_to(outside)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": _cut,
    "empty": _empty,
    "random": _random,
    "overwritten": _overwrite,
    "other-tensors": _saved_again(_flip_a_moment),
    "junk": _saved_again(lambda checkpoint: checkpoint["fpq"].update(layers=[1], step="x")),
    "a-pipe": _pipe,
    "a-link-that-leads-out": _link_out,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_for_the_one_before_it(runs: Runs, damage: str) -> None:
    name = f"damaged-{damage}"
    runs.copy(name)
    DAMAGES[damage](runs.checkpoint(name))
    resumed = runs.resume(name)
    assert resumed.code == 0, resumed.err
    warned = [line for line in resumed.err.splitlines() if str(runs.checkpoint(name)) in line]
    assert len(warned) == 1
    assert "the one before it" in warned[0]
    assert "beginning" not in resumed.out
    runs.assert_as_uninterrupted(name)


def test_an_intact_checkpoint_is_gone_on_with_without_a_warning(runs: Runs) -> None:
    runs.copy("intact")
    resumed = runs.resume("intact")
    assert resumed.code == 0, resumed.err
    assert ".ckpt" not in resumed.err
    runs.assert_as_uninterrupted("intact")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


@pytest.mark.parametrize("only", [False, True], ids=["both", "the-only-one"])
def test_a_run_whose_checkpoints_are_all_damaged_ends_in_one_line_and_deletes_nothing(runs: Runs, only: bool) -> None:
    name = f"all-damaged-{only}"
    runs.copy(name)
    _cut(runs.checkpoint(name))
    if only:
        runs.checkpoint(name, "previous.ckpt").unlink()
    else:
        _random(runs.checkpoint(name, "previous.ckpt"))
    before = contents(runs.root / name)
    assert_one_line(runs.resume(name), str(runs.checkpoint(name).parent), "can be read")
    assert contents(runs.root / name) == before


def test_a_damaged_checkpoint_asked_for_by_name_ends_in_one_line(runs: Runs, tmp_path: Path) -> None:
    file = tmp_path / "mine.ckpt"
    shutil.copy(runs.checkpoint("interrupted"), file)
    _cut(file)
    runs.copy("by-name")
    before = contents(runs.root / "by-name")
    assert_one_line(runs.fit("by-name", f"--ckpt_path={file}"), "mine.ckpt", "cannot be read")
    assert contents(runs.root / "by-name") == before


# --- what is in it ---------------------------------------------------------------------------------------------


# Units done, steps done in the next one.
KINDS = {"within a unit": (4, 20), "earlier within it": (4, 10), "after a unit": (6, 0), "finished": (12, 0)}


@pytest.fixture(scope="module")
def checkpoints(runs: Runs) -> dict[str, Path]:
    """A checkpoint of every kind."""
    # What is written beside the seventh unit is there before it is saved.
    assert runs.fit("next-unit", harm=disturbance("trainer", "save_checkpoint", MID_UNIT + 3)).code == -signal.SIGKILL
    files = [
        runs.checkpoint("interrupted"),
        runs.checkpoint("interrupted", "previous.ckpt"),
        runs.checkpoint("next-unit"),
        runs.checkpoint("reference"),
    ]
    return dict(zip(KINDS, files, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_loads_without_running_code(checkpoints: dict[str, Path], kind: str) -> None:
    state = torch.load(checkpoints[kind], weights_only=True)["fpq"]
    assert (state["unit"], state["step"]) == KINDS[kind]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_no_full_precision_weights(checkpoints: dict[str, Path], kind: str) -> None:
    weights = {k: w.flatten() for k, w in tiny_unet().state_dict().items() if w.unique().numel() >= 16}
    assert len(weights) > 20
    for tensor in _tensors(torch.load(checkpoints[kind], weights_only=True)):
        if tensor.is_floating_point():  # what is written is the storage behind it
            values = tensor.new_empty(0).set_(tensor.untyped_storage())
            assert [k for k, w in weights.items() if torch.isin(w, values).float().mean() > 0.5] == []


def _payload(tree: Any) -> int:
    """Bytes of the storages behind the tensors of a checkpoint."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(tree)}
    return sum(s.nbytes() for s in storages.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_codes_and_scales_and_three_float32_for_each_weight_of_the_unit_in_work(
    checkpoints: dict[str, Path], kind: str
) -> None:
    checkpoint = torch.load(checkpoints[kind], weights_only=True)
    files = [checkpoints[kind], *_units(checkpoints[kind])]
    finished = [torch.load(file, weights_only=True) for file in files[1:]]
    model = {k: w for k, w in tiny_unet().state_dict().items() if k.endswith(".weight") and w.ndim > 1}
    state = checkpoint["fpq"]
    unit = state["reports"][state["unit"]]["name"] if KINDS[kind][1] else "none"
    in_work = [w for k, w in model.items() if k.startswith(unit)]
    done = [w for k, w in model.items() if any(k.removesuffix(".weight") in layers for layers in finished)]
    assert bool(in_work) == (KINDS[kind][1] > 0)
    assert done
    # A code a weight; scales of channels and of the input, for nearest and for learned rounding; perhaps a bias.
    expected = sum(w.numel() + 4 * (3 * len(w) + 2) for w in done)
    # Scales of nearest rounding; what is learned (rounding, factors of scales) and its two moments; counts of steps.
    expected += sum(4 * (len(w) + 1) + 3 * 4 * (w.numel() + len(w) + 1) + 3 * 4 for w in in_work)
    parts = [checkpoint, *finished]
    payload, size, n = _payload(parts), sum(f.stat().st_size for f in files), len(_tensors(parts))
    float32 = sum(4 * w.numel() for w in model.values())
    print(f"{kind}: {size:,} bytes, of which {payload:,} in {n} tensors; {float32:,} bytes of weights in float32")
    assert payload <= expected
    assert size <= payload + 400 * n + 8000 + 2000 * len(finished)
    assert all(name.startswith(unit) for name in state["layers"])


def _units(checkpoint: Path) -> list[Path]:
    """The files of the finished units that a checkpoint names."""
    count = len(torch.load(checkpoint, weights_only=True)["finished_units"])
    files = sorted((checkpoint.parent / "units").iterdir())
    return files[:count]


def test_a_finished_unit_is_written_once(runs: Runs) -> None:
    runs.copy("once")
    before = {f.name: f.stat().st_mtime_ns for f in _units(runs.checkpoint("once"))}
    assert len(before) == 4
    assert runs.resume("once").code == 0
    after = {f.name: f.stat().st_mtime_ns for f in _units(runs.checkpoint("once"))}
    assert len(after) == 12
    assert before.items() <= after.items()


@pytest.mark.parametrize("damage", ["cut", "random", "missing"])
def test_a_damaged_file_of_a_finished_unit_ends_the_resume_with_its_name(runs: Runs, damage: str) -> None:
    name = f"unit-{damage}"
    runs.copy(name)
    file = _units(runs.checkpoint(name))[1]  # of the first quantized layer
    DAMAGES.get(damage, Path.unlink)(file)
    resumed = runs.resume(name)
    assert resumed.code == 1
    assert len(resumed.errors) == 1, resumed.err
    assert str(runs.checkpoint(name).parent) in resumed.errors[0]
    assert str(file) in resumed.err


def test_a_checkpoint_that_was_copied_with_its_units_is_gone_on_with_in_another_directory(runs: Runs) -> None:
    source = runs.root / "copied"
    shutil.copytree(runs.checkpoint("interrupted").parent, source)
    found = runs.fit("elsewhere-resumed", f"--ckpt_path={source / 'last.ckpt'}")
    assert found.code == 0, found.err
    assert quantized_files(runs.root / "elsewhere-resumed") == runs.reference
    assert len(list((runs.checkpoint("elsewhere-resumed").parent / "units").iterdir())) == 12


def test_a_checkpoint_of_an_older_version_is_refused_with_a_line(runs: Runs) -> None:
    runs.copy("older")
    for file in ("last.ckpt", "previous.ckpt"):
        checkpoint = torch.load(runs.checkpoint("older", file), weights_only=True)
        del checkpoint["finished_units"]
        torch.save(checkpoint, runs.checkpoint("older", file))
    assert_one_line(runs.resume("older"), "older version", "begin again")


# --- of another run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def donors(runs: Runs) -> dict[str, Path]:
    """A checkpoint of each of three runs that differ from ours in one thing."""
    other = save_tiny(runs.root / "other-model", seed=1)
    differences = {
        "recipe.weights.formats: fp8 -> fp4": "--recipe.weights.formats=fp8",
        "calibration.seed: 5 -> 0": "--data.seed=5",
        "model.weights": f"--model={other}",
    }
    found = {}
    for i, (message, option) in enumerate(differences.items()):
        harm = disturbance("os", "replace", 2, file=".last.ckpt")
        assert runs.fit(f"donor-{i}", option, harm=harm).code == -signal.SIGKILL
        found[message] = runs.checkpoint(f"donor-{i}", "previous.ckpt")
    return found


DIFFERENCES = ["recipe.weights.formats: fp8 -> fp4", "calibration.seed: 5 -> 0", "model.weights"]


@pytest.mark.parametrize(
    ("difference", "by_name"),
    [*((d, False) for d in DIFFERENCES), (DIFFERENCES[0], True)],
    ids=[*DIFFERENCES, "by name"],
)
def test_a_checkpoint_of_another_run_is_refused_naming_what_differs(
    runs: Runs, donors: dict[str, Path], difference: str, by_name: bool
) -> None:
    name = f"visited-{DIFFERENCES.index(difference)}-{by_name}"
    runs.copy(name)
    file = runs.checkpoint(name, "mine.ckpt" if by_name else "last.ckpt")
    shutil.copy(donors[difference], file)
    before = contents(runs.root / name)
    outcome = runs.fit(name, f"--ckpt_path={file if by_name else 'last'}")
    assert_one_line(outcome, file.name, difference)
    assert contents(runs.root / name) == before


# --- signals ---------------------------------------------------------------------------------------------------

TERMINATIONS = {
    "within a batch of steps": disturbance("steps", "gradients", ITERATIONS + 4, number=signal.SIGTERM),
    "in the last step of a unit": disturbance("steps", "gradients", ITERATIONS, number=signal.SIGTERM),
    "while a checkpoint is written": disturbance("os", "replace", MID_UNIT, file=".last.ckpt", number=signal.SIGTERM),
}


def assert_stopped(outcome: Outcome, *codes: int) -> str:
    """Ended by a signal with its state saved; returns the one line that says so."""
    assert outcome.code in (codes or [128 + signal.SIGTERM]), (outcome.code, outcome.err)
    assert "Traceback" not in outcome.err
    assert outcome.errors == []
    (line,) = [line for line in outcome.out.splitlines() if "signal" in line]
    assert "--ckpt_path last" in line
    return line


@pytest.mark.parametrize("moment", TERMINATIONS)
def test_a_run_told_to_terminate_saves_and_resumes_to_the_same_bits(runs: Runs, moment: str) -> None:
    name = moment.replace(" ", "-")
    assert "requeued" not in assert_stopped(runs.fit(name, harm=TERMINATIONS[moment]))
    assert not (runs.root / name / "quantized").exists()
    resumed = runs.resume(name)
    assert resumed.code == 0, resumed.err
    runs.assert_as_uninterrupted(name)


def test_a_run_interrupted_by_hand_saves_and_resumes_to_the_same_bits(runs: Runs) -> None:
    harm = disturbance("steps", "gradients", ITERATIONS + 4, number=signal.SIGINT)
    assert_stopped(runs.fit("by-hand", harm=harm), 128 + signal.SIGINT, 128 + signal.SIGTERM)
    resumed = runs.resume("by-hand")
    assert resumed.code == 0, resumed.err
    runs.assert_as_uninterrupted("by-hand")


def test_a_run_told_to_terminate_saves_the_steps_it_has_done(runs: Runs) -> None:
    # The third step of a batch: without the signal the next checkpoint would be after the unit.
    harm = disturbance("steps", "gradients", ITERATIONS + 3, number=signal.SIGTERM)
    assert_stopped(runs.fit("third-step", "--checkpoint_steps=1000", harm=harm))
    state = torch.load(runs.checkpoint("third-step"), weights_only=True)["fpq"]
    assert (state["unit"], state["step"]) == (4, 10)


EVALUATION = ["--evaluation.n_images=3", f"--evaluation.features={CHECKOUT / 'data' / 'cifar10-features'}"]


LATE = {
    "while-images-are-sampled": disturbance("image_quality", "sample_variant", 1, number=signal.SIGTERM),
    "at-the-end-of-the-last-unit": disturbance("unit", "end", 12, number=signal.SIGTERM),
}


@pytest.mark.parametrize("moment", LATE)
def test_a_run_told_to_terminate_does_not_go_on_to_evaluate(runs: Runs, moment: str) -> None:
    outcome = runs.fit(moment, *EVALUATION, harm=LATE[moment])
    assert outcome.code in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert not (runs.root / moment / "report.json").exists()
    resumed = runs.resume(moment, *EVALUATION)
    assert resumed.code == 0, resumed.err
    assert (runs.root / moment / "report.json").is_file()
    runs.assert_as_uninterrupted(moment)


def test_a_run_told_to_terminate_before_it_learns_ends_and_can_be_started_again(runs: Runs) -> None:
    harm = disturbance("data", "make_set", 1, number=signal.SIGTERM)
    assert runs.fit("sampling", harm=harm).code in (-signal.SIGTERM, 128 + signal.SIGTERM)
    again = runs.fit("sampling")
    assert again.code == 0, again.err
    runs.assert_as_uninterrupted("sampling")


@dataclass
class Cluster:
    """What a run sees of SLURM."""

    environment: dict[str, str]
    directory: Path
    log: Path

    @property
    def requeued(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def make_cluster(root: Path, code: int | None = 0) -> Cluster:
    """A cluster whose ``scontrol`` exits with a code, or that has none."""
    log, directory = root / "scontrol.log", root / "working-directory"
    directory.mkdir()
    path = os.environ["PATH"]
    if code is not None:
        (root / "bin").mkdir()
        program = root / "bin" / "scontrol"
        program.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexit {code}\n')
        program.chmod(0o755)
        path = f"{program.parent}:{path}"
    return Cluster({**SLURM, "PATH": path}, directory, log)


REQUEUE = disturbance("steps", "gradients", ITERATIONS + 14, number=signal.SIGUSR1)


def test_a_run_whose_time_is_up_on_slurm_saves_is_requeued_and_resumes_to_the_same_bits(
    runs: Runs, tmp_path: Path
) -> None:
    cluster = make_cluster(tmp_path)
    where: dict[str, Any] = {"environment": cluster.environment, "directory": cluster.directory}
    assert "requeued" in assert_stopped(runs.resume("slurm", harm=REQUEUE, **where))
    assert cluster.requeued == ["requeue 4711"]
    assert list(cluster.directory.iterdir()) == []
    resumed = runs.resume("slurm", **where)  # the same command
    assert resumed.code == 0, resumed.err
    assert "no checkpoint" not in resumed.out
    assert cluster.requeued == ["requeue 4711"]
    assert list(cluster.directory.iterdir()) == []
    runs.assert_as_uninterrupted("slurm")


def test_a_task_of_a_slurm_array_is_requeued_by_its_own_name(runs: Runs, tmp_path: Path) -> None:
    cluster = make_cluster(tmp_path)
    array = {**cluster.environment, "SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "3"}
    assert_stopped(runs.fit("array", harm=REQUEUE, environment=array, directory=cluster.directory))
    assert cluster.requeued == ["requeue 4700_3"]


@pytest.mark.parametrize("code", [1, None], ids=["fails", "missing"])
def test_a_run_that_cannot_be_requeued_saves_and_does_not_say_that_it_was(
    runs: Runs, tmp_path: Path, code: int | None
) -> None:
    cluster = make_cluster(tmp_path, code)
    name = f"no-scontrol-{code}"
    outcome = runs.fit(name, harm=REQUEUE, environment=cluster.environment, directory=cluster.directory)
    assert "requeued" not in assert_stopped(outcome)
    assert runs.checkpoint(name).is_file()
    assert list(cluster.directory.iterdir()) == []


def test_a_run_told_to_terminate_on_slurm_is_not_requeued(runs: Runs, tmp_path: Path) -> None:
    cluster = make_cluster(tmp_path)
    harm = TERMINATIONS["within a batch of steps"]
    outcome = runs.fit("scancel", harm=harm, environment=cluster.environment, directory=cluster.directory)
    assert "requeued" not in assert_stopped(outcome)
    assert cluster.requeued == []
    assert list(cluster.directory.iterdir()) == []


# --- no place to write -----------------------------------------------------------------------------------------


def assert_resumes(runs: Runs, name: str) -> None:
    for file in (runs.root / name / "checkpoints").rglob("*.*"):
        torch.load(file, weights_only=True)
    resumed = runs.resume(name)
    assert resumed.code == 0, resumed.err
    assert "no checkpoint" not in resumed.out
    runs.assert_as_uninterrupted(name)


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint_and_the_run_resumes(runs: Runs) -> None:
    limit = runs.checkpoint("interrupted").stat().st_size - 1
    elsewhere = runs.root / "full-elsewhere"
    elsewhere.mkdir()
    outcome = runs.fit("full", file_size=limit, environment={"TMPDIR": str(elsewhere)})
    assert_one_line(outcome, "File too large", "free space", str(runs.root / "full"))
    assert list(elsewhere.iterdir()) == []
    assert sorted(f.name for f in runs.checkpoint("full").parent.iterdir()) == ["last.ckpt", "previous.ckpt", "units"]
    assert torch.load(runs.checkpoint("full"), weights_only=True)["fpq"]["unit"] == 4
    assert_resumes(runs, "full")


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
def test_a_directory_that_cannot_be_written_any_more_ends_in_one_line_and_the_run_resumes(
    runs: Runs, error: int
) -> None:
    name = f"error-{errno.errorcode[error]}"
    outcome = runs.fit(name, harm=disturbance("trainer", "save_checkpoint", MID_UNIT, error=error))
    assert_one_line(outcome, str(runs.checkpoint(name).parent), os.strerror(error))
    if error == errno.EROFS:
        assert_resumes(runs, name)


def test_a_rename_that_fails_ends_in_one_line_and_the_run_resumes(runs: Runs) -> None:
    harm = disturbance("os", "replace", MID_UNIT, file=".last.ckpt", error=errno.EIO)
    assert_one_line(runs.fit("rename", harm=harm), str(runs.checkpoint("rename").parent))
    assert_resumes(runs, "rename")


def test_a_place_for_checkpoints_that_is_a_file_ends_in_one_line(runs: Runs) -> None:
    directory = runs.copy("occupied")
    shutil.rmtree(directory / "checkpoints")
    (directory / "checkpoints").write_text("mine")
    assert_one_line(runs.resume("occupied"), str(directory / "checkpoints"))
    assert (directory / "checkpoints").read_text() == "mine"
