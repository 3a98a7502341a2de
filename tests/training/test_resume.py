"""A run that is killed and resumed gives the same bits as one that was not."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from models import Outcome, fit_arguments, run_scenarios, save_tiny, scenario
from safetensors.numpy import load_file

from fpq_lightning.training.run_directory import RunDirectory, RunState, differences

ITERATIONS = 20  # two batches of ten steps a unit, and a checkpoint after each

# The n-th call of a function is where SIGKILL comes; units have 20 steps.
KILLS = {
    "mid-unit-after-a-checkpoint": ("steps", "gradients", 3 * 20 + 16),
    "mid-unit-before-its-first-checkpoint": ("steps", "gradients", 3 * 20 + 6),
    "first-step-after-the-end-of-a-unit": ("steps", "gradients", 4 * 20 + 1),
    "between-the-last-step-and-the-end-of-a-unit": ("unit", "end", 6),
    "in-the-last-unit": ("steps", "gradients", 11 * 20 + 15),
    "before-quantized-is-written": ("finalize", "save_quantized", 1),
    "before-any-checkpoint": ("steps", "gradients", 4),
}


@dataclass
class Runs:
    reference: Path
    outcomes: dict[str, Outcome]
    directories: dict[str, Path]
    model: str


def _tensors(run: Path) -> dict[str, bytes]:
    file = run / "quantized" / "unet" / "diffusion_pytorch_model.safetensors"
    return {name: value.tobytes() for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("resume")
    model = save_tiny(root / "model")
    other = save_tiny(root / "other", seed=1)

    def fit(name: str, *more: str, model: str = model) -> list[str]:
        return [*fit_arguments(model, root / name, ITERATIONS), "--checkpoint_steps=10", *more]

    scenarios = {"reference": scenario(root / "reference-log", fit("reference"))}
    for name, kill in KILLS.items():
        scenarios[f"{name}: killed"] = scenario(root / f"{name}-killed", fit(name), kill)
        if name == "mid-unit-after-a-checkpoint":
            scenarios["unfinished"] = scenario(root / "unfinished-log", fit(name))
        resumed = fit(name, "--ckpt_path=last")
        scenarios[f"{name}: resumed"] = scenario(root / f"{name}-resumed", resumed)
    twice = fit("twice", "--ckpt_path=last")
    scenarios["twice: 1"] = scenario(root / "twice-1", fit("twice"), ("steps", "gradients", 35))
    scenarios["twice: 2"] = scenario(root / "twice-2", twice, ("steps", "gradients", 35))
    scenarios["twice: 3"] = scenario(root / "twice-3", twice)
    scenarios["finished"] = scenario(root / "finished-log", fit("reference"))
    scenarios["finished with ckpt_path"] = scenario(root / "finished-2", fit("reference", "--ckpt_path=last"))
    changed = fit("reference", "--recipe.weights.formats=fp8")
    scenarios["other recipe"] = scenario(root / "other-recipe", changed)
    scenarios["other model"] = scenario(root / "other-model", fit("reference", model=other))
    outcomes = dict(zip(scenarios, run_scenarios(list(scenarios.values())), strict=True))
    directories = {name: root / name for name in [*KILLS, "twice"]}
    return Runs(root / "reference", outcomes, directories, model)


def test_the_uninterrupted_run_finishes(runs: Runs) -> None:
    outcome = runs.outcomes["reference"]
    assert outcome.code == 0, outcome.err
    assert (runs.reference / "report.json").is_file()
    assert (runs.reference / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_resumes_to_the_same_bits(runs: Runs, name: str) -> None:
    assert runs.outcomes[f"{name}: killed"].code == -signal.SIGKILL
    resumed = runs.outcomes[f"{name}: resumed"]
    assert resumed.code == 0, resumed.err
    expected, found = _tensors(runs.reference), _tensors(runs.directories[name])
    assert {k for k in expected if expected[k] != found[k]} == set()
    assert expected.keys() == found.keys()


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_resumes_to_the_same_formats_scales_and_report(runs: Runs, name: str) -> None:
    found, expected = (
        json.loads((directory / "quantized" / "unet" / "config.json").read_text())["quantization_config"]
        for directory in (runs.directories[name], runs.reference)
    )
    assert found["layers"] == expected["layers"]
    reports = [json.loads((d / "report.json").read_text())["blocks"] for d in (runs.reference, runs.directories[name])]
    for block in [b for report in reports for b in report]:
        assert block.pop("seconds") > 0
    assert reports[1] == reports[0]


def test_a_run_killed_twice_resumes_to_the_same_bits(runs: Runs) -> None:
    codes = [runs.outcomes[f"twice: {i}"].code for i in (1, 2, 3)]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0], runs.outcomes["twice: 3"].err
    assert _tensors(runs.directories["twice"]) == _tensors(runs.reference)


def test_resuming_goes_on_with_the_unit_in_work_instead_of_repeating_finished_ones(runs: Runs) -> None:
    resumed = runs.outcomes["mid-unit-after-a-checkpoint: resumed"]
    lines = [line for line in (resumed.out + resumed.err).replace("\r", "\n").splitlines() if "/12] " in line]
    assert [line.strip()[:6] for line in lines if "->" in line] == [f"[{i:>2}/12" for i in range(4, 13)]


def test_a_killed_run_leaves_nothing_that_looks_finished(runs: Runs) -> None:
    # The resume ran in the same directory, so what the kill left is known from what the next command said.
    unfinished = runs.outcomes["unfinished"]
    assert unfinished.code != 0
    assert len(unfinished.errors) == 1
    assert "--ckpt_path last" in unfinished.errors[0]
    assert "Traceback" not in unfinished.err


def test_resuming_without_any_checkpoint_starts_from_the_beginning_and_says_so(runs: Runs) -> None:
    resumed = runs.outcomes["before-any-checkpoint: resumed"]
    assert resumed.code == 0
    assert "no checkpoint" in resumed.out
    assert "beginning" in resumed.out
    assert "no checkpoint" not in runs.outcomes["in-the-last-unit: resumed"].out


@pytest.mark.parametrize("name", ["finished", "finished with ckpt_path"])
def test_the_command_of_a_finished_run_says_so_and_exits_0(runs: Runs, name: str) -> None:
    outcome = runs.outcomes[name]
    assert outcome.code == 0, outcome.err
    assert "finished" in outcome.out
    assert str(runs.reference) in outcome.out


@pytest.mark.parametrize(("name", "what"), [("other recipe", "recipe.weights.formats"), ("other model", "model")])
def test_another_run_is_refused_the_directory_and_told_what_differs(runs: Runs, name: str, what: str) -> None:
    outcome = runs.outcomes[name]
    assert outcome.code != 0
    assert len(outcome.errors) == 1
    assert what in outcome.errors[0]
    assert "Traceback" not in outcome.err
    if name == "other recipe":
        assert "fp4 -> fp8" in outcome.errors[0]


def test_no_temporary_files_are_left_in_a_run_directory(runs: Runs) -> None:
    for directory in [runs.reference, *runs.directories.values()]:
        assert [f.name for f in directory.iterdir() if f.name.startswith(".")] == []


def test_differences_names_each_path_where_two_values_differ() -> None:
    a = {"x": {"y": 1, "z": [1, 2]}, "same": 3}
    assert differences(a, {"x": {"y": 2, "z": [1, 2]}, "same": 3}) == ["x.y: 1 -> 2"]
    assert differences(a, {"x": {"y": 1}, "same": 3, "new": 4}) == ["new: None -> 4", "x.z: [1, 2] -> None"]
    assert differences(a, a) == []


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match="choose another --run_dir"):
        RunDirectory(tmp_path, {"a": 1}).state()
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_second_command_is_kept_out_of_a_directory_while_the_first_works_in_it(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path / "run", {"a": 1}), RunDirectory(tmp_path / "run", {"a": 1})
    with first.working(), pytest.raises(ValueError, match="another process works in"), second.working():
        pass
    with second.working():
        pass


def test_a_run_that_never_got_anywhere_leaves_its_directory_to_others(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", {"a": 1}).working():
        pass
    other = RunDirectory(tmp_path / "run", {"a": 2})
    assert other.state() is RunState.NEW
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "previous.ckpt").touch()
    with pytest.raises(ValueError, match="a: 1 -> 2"):
        other.state()
