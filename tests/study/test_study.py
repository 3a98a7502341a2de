"""Studies: rows that are computed once, joined from anywhere, and tables that say what they hold."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from models import CHECKOUT, run_fpq, save_tiny, tiny_pipeline

from fpq_lightning.cli import main
from fpq_lightning.diffusion.sampling import SamplerConfig
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.formats.numbers import parse_formats
from fpq_lightning.nn.calibrated import LayerQuantization
from fpq_lightning.nn.convert import make_quantized
from fpq_lightning.quantization.quantizer import Granularity, Quantizer
from fpq_lightning.quantization.search import search_tensor_error
from fpq_lightning.reconstruction import unit
from fpq_lightning.study.config import RowConfig, StudyConfig, merge
from fpq_lightning.study.run import Study
from fpq_lightning.study.table import csv_table, markdown_table, read_rows, spreads
from fpq_lightning.study.trajectory import trajectory_errors
from fpq_lightning.utils.digests import with_digest

STUDIES = sorted((CHECKOUT / "configs" / "study").glob("*.yaml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def grid(model: str, root: Path, **rows: Any) -> dict[str, Any]:
    rounding = {"start": "nearest", "learned": True, "iterations": 5, "batch_size": 4}
    return {
        "model": model,
        "output": str(root / "study"),
        "scratch": str(root / "scratch"),
        "sampler": {"steps": 4, "batch_size": 4},
        "evaluation": {"n_images": 4},
        "recipe": {"rounding": rounding, "include": ["conv_in", "mid_block.resnets.0.*"]},
        "data": {"n_samples": 16, "n_search": 8, "micro_batch": 8},
        "trajectories": 2,
        "rows": rows,
    }


ROWS = {
    "fp32": {"variants": ["full_precision", "other_seeds"]},
    "fp8": {"config": "fp8_fp8"},
    "fp4": {"config": "fp4_fp8", "data": {"seed": 7}, "variants": ["quantized"], "group": "second seed"},
}


def run(values: dict[str, Any], root: Path, *more: str) -> None:
    file = root / "study.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    main(["study", "--config", str(file), *more])


@pytest.fixture(scope="module")
def study(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    run(grid(model, root, **ROWS), root)
    return root


# --- rows ------------------------------------------------------------------------------------------------------


def test_each_row_is_a_file_with_what_made_it(study: Path) -> None:
    files = {file.name: json.loads(file.read_text()) for file in (study / "study" / "rows").iterdir()}
    assert files.keys() == {
        "fp32.full_precision.json",
        "fp32.other_seeds.json",
        "fp8.nearest.json",
        "fp8.quantized.json",
        "fp4.quantized.json",
    }
    quantized = files["fp8.quantized.json"]
    assert quantized["settings"]["recipe"]["rounding"]["iterations"] == 5
    assert quantized["settings"]["recipe"]["include"] == ["conv_in", "mid_block.resnets.0.*"]
    assert files["fp4.quantized.json"]["settings"]["data"]["seed"] == 7
    assert quantized["weight_bits"] > 8
    assert 4 < files["fp4.quantized.json"]["weight_bits"] < quantized["weight_bits"]
    assert quantized["metrics"]["psnr"] > files["fp4.quantized.json"]["metrics"]["psnr"]
    assert files["fp32.other_seeds.json"]["metrics"]["psnr"] is None
    assert files["fp32.other_seeds.json"]["metrics"]["fd"] > 0


def test_what_rows_share_is_made_once(study: Path) -> None:
    (scratch,) = (study / "scratch").iterdir()
    assert len(list(scratch.glob("calibration-*"))) == 2  # of two seeds
    assert len(list((scratch / "full_precision").glob("*.png"))) == 8  # and those of other seeds


def test_rows_that_are_there_are_not_computed_again(
    study: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(study / "study" / "rows", tmp_path / "study" / "rows")
    monkeypatch.setattr("fpq_lightning.study.run.quantize", None)
    run(grid(model, tmp_path, **ROWS), tmp_path)
    assert "table.md" in capsys.readouterr().out
    assert (tmp_path / "study" / "table.md").read_text() == (study / "study" / "table.md").read_text()


def test_rows_computed_apart_join_into_one_table(study: Path, model: str, tmp_path: Path) -> None:
    for name in ROWS:
        root = tmp_path / name
        root.mkdir()
        run(grid(model, root, **ROWS), root, f"--only=[{name}]")
        assert all(file.name.startswith(name) for file in (root / "study" / "rows").iterdir())
    joined = tmp_path / "joined" / "study" / "rows"
    joined.mkdir(parents=True)
    for name in ROWS:
        for file in (tmp_path / name / "study" / "rows").iterdir():
            shutil.copy(file, joined)
    run(grid(model, tmp_path / "joined", **ROWS), tmp_path / "joined")
    assert (tmp_path / "joined" / "study" / "table.md").read_text() == (study / "study" / "table.md").read_text()


def test_a_row_made_otherwise_is_refused_and_the_difference_named(
    study: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(study / "study" / "rows", tmp_path / "study" / "rows")
    values = grid(model, tmp_path, **ROWS)
    values["recipe"]["rounding"]["iterations"] = 6
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    outcome = run_fpq(capsys, ["study", "--config", str(file)])
    assert outcome.code != 0
    assert "was made with other settings" in outcome.err
    assert "recipe.rounding.iterations: 5 -> 6" in outcome.err


def test_a_study_that_died_after_a_calibration_goes_on_from_it(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = grid(model, tmp_path, fp8={"config": "fp8_fp8", "variants": ["quantized"]})

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fpq_lightning.study.run.Evaluator.compare", die)
        with pytest.raises(SystemExit, match="130"):  # what the command line makes of it
            run(values, tmp_path)
    steps: list[int] = []
    original = unit.gradients

    def counted(*args: Any) -> Any:
        steps.append(1)
        return original(*args)

    monkeypatch.setattr(unit, "gradients", counted)
    run(values, tmp_path)
    assert (tmp_path / "study" / "rows" / "fp8.quantized.json").is_file()
    assert not steps


# --- tables ----------------------------------------------------------------------------------------------------


def test_the_table_holds_the_rows_in_the_order_of_the_study(study: Path) -> None:
    text = (study / "study" / "table.md").read_text()
    lines = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    names = [(name.removeprefix("| "), rounding) for name, rounding in lines if name != "| row"]
    of_fp32, of_fp8 = [("fp32", "full precision"), ("fp32", "other seeds")], [("fp8", "nearest"), ("fp8", "quantized")]
    assert names == [*of_fp32, *of_fp8, ("fp4", "quantized")]
    assert "### second seed" in text
    assert "4 images" in text


def test_the_csv_holds_the_figures_unrounded(study: Path) -> None:
    rows = list(csv.DictReader((study / "study" / "table.csv").open()))
    assert len(rows) == 5
    for row in rows:
        file = study / "study" / "rows" / f"{row['name']}.{row['variant']}.json"
        assert float(row["fd"]) == json.loads(file.read_text())["metrics"]["fd"]


def test_the_figures_are_drawn(study: Path) -> None:
    for name in ("quality_fd.png", "quality_psnr.png", "trajectory.png"):
        assert (study / "study" / name).stat().st_size > 5000


def _row(name: str, variant: str, group: str = "recipes", **metrics: Any) -> dict[str, Any]:
    metrics = {"fd": 1.0, "psnr": None, "n_images": 5, **metrics}
    where = {"hardware": "H", "versions": {"torch": "2"}, "date": "2026-01-02"}
    return {"name": name, "variant": variant, "group": group, "metrics": metrics, **where}


@pytest.mark.parametrize("name", ["cifar10", "cifar10_ablations", "cifar10_large"])
def test_the_committed_rows_are_those_of_the_shipped_studies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    values = yaml.safe_load((CHECKOUT / "configs" / "study" / f"{name}.yaml").read_text())
    sampler, evaluation = SamplerConfig(**values.pop("sampler")), EvaluationConfig(**values.pop("evaluation"))
    rows = {row: RowConfig(**entry) for row, entry in values.pop("rows").items()}
    config = StudyConfig(
        **{**values, "model": "data/cifar10-ddpm-small"}, rows=rows, sampler=sampler, evaluation=evaluation
    )
    if name == "cifar10_large":  # whose model is not there to be hashed
        monkeypatch.setattr("fpq_lightning.study.run.hash_weights", lambda model: _weights_of(config.output))
    study = Study(config, torch.device("cpu"))  # refuses rows that were made with other settings
    kept = {file.name for file in (Path(config.output) / "rows").iterdir()}
    assert kept <= {study.file(*key).name for key in study.settings}
    if name != "cifar10_large":
        assert not study.missing()


def _weights_of(output: str) -> str:
    return json.loads((Path(output) / "rows" / "fp32.full_precision.json").read_text())["settings"]["images"]["weights"]


def test_recipes_that_differ_in_their_seed_alone_show_how_much_it_matters() -> None:
    def row(name: str, seed: int, fd: float, variant: str = "quantized", iterations: int = 5) -> dict[str, Any]:
        settings = {"variant": variant, "data": {"seed": seed, "n": 4}, "recipe": {"iterations": iterations}}
        return {**_row(name, variant, fd=fd, psnr=None), "settings": settings}

    rows = [row("a", 1, 2.0), row("b", 2, 2.5), row("c", 3, 1.75), row("d", 1, 9.0, iterations=6)]
    rows.append(row("e", 1, 7.0, "nearest"))
    found = spreads(rows)
    assert [(r["name"], r["variant"], r["metrics"]) for r in found] == [("a, 3 seeds", "quantized", {"fd": 0.75})]
    assert "### largest difference between seeds" in markdown_table(rows)
    assert "difference" not in markdown_table(rows[3:])


def test_columns_without_a_value_are_left_out() -> None:
    text = markdown_table([_row("a", "nearest"), _row("b", "quantized", "more", psnr=20.123)])
    assert text.splitlines()[2] == "| row | variant | FD |"
    assert "| b | quantized | 1.000 | 20.12 |" in text
    assert csv_table([_row("a", "nearest")]).splitlines()[1].startswith("a,nearest,recipes,")


def test_a_row_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.quantized.json").write_text('{"name": "a"')
    with pytest.raises(ValueError, match=r"a\.quantized\.json cannot be read .*delete it"):
        read_rows(tmp_path)


WHOLE = {"name": "a", "variant": "quantized", "group": "recipes", "hardware": "cpu", "date": "2026-11-28"}
WHOLE |= {"versions": {"torch": "2.11"}, "metrics": {"fd": 1.0, "n_images": 4}, "settings": {}}
DAMAGED = {
    "nothing": None,
    "a list": [1],
    "no metrics": {k: v for k, v in WHOLE.items() if k != "metrics"},
    "no date": {k: v for k, v in WHOLE.items() if k != "date"},
    "metrics of text": {**WHOLE, "metrics": {"fd": "1", "n_images": 4}},
    "no number of images": {**WHOLE, "metrics": {"fd": 1.0}},
    "an unknown variant": {**WHOLE, "variant": "other"},
    "a name that is a list": {**WHOLE, "name": ["a"]},
    "bits of text": {**WHOLE, "weight_bits": "4"},
    "a trajectory of two lengths": {**WHOLE, "trajectory": {"timesteps": [2, 1], "output": [0.5], "state": [0.5, 1]}},
    "other values than were written": {**with_digest(WHOLE), "metrics": {"fd": 1.5, "n_images": 4}},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_row_is_one_line_with_its_name(tmp_path: Path, damage: str) -> None:
    (tmp_path / "rows").mkdir()
    file = tmp_path / "rows" / "a.quantized.json"
    file.write_text(json.dumps(with_digest(WHOLE)))
    assert read_rows(tmp_path) == [WHOLE]
    file.write_text(json.dumps(DAMAGED[damage]))
    with pytest.raises(ValueError, match=r"a\.quantized\.json cannot be read .*delete it") as error:
        read_rows(tmp_path)
    assert "\n" not in str(error.value)


def test_a_pipe_in_place_of_a_row_is_not_waited_for(model: str, tmp_path: Path) -> None:
    (tmp_path / "study" / "rows").mkdir(parents=True)
    os.mkfifo(tmp_path / "study" / "rows" / "fp8.quantized.json")
    with pytest.raises(ValueError, match="is a pipe"):
        read_rows(tmp_path / "study")
    with pytest.raises(SystemExit, match="is a pipe"):
        run(grid(model, tmp_path, fp8=ROWS["fp8"]), tmp_path)


# --- configurations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f.stem)
def test_every_row_of_a_shipped_study_can_be_built(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    values = yaml.safe_load(file.read_text())
    rows = {name: RowConfig(**row) for name, row in values["rows"].items()}
    study = StudyConfig(values["model"], values["output"], rows, recipe=values["recipe"], data=values["data"])
    built = {name: study.build(name) for name in rows}
    assert rows.pop("fp32").variants == ["full_precision", "other_seeds"]
    assert len(rows) >= 3
    recipes = [json.dumps([built[n][0].to_dict(), built[n][1].identity()], sort_keys=True) for n in rows]
    assert len(set(recipes)) == len(recipes)  # no row twice
    for name, (recipe, data) in built.items():
        assert recipe.rounding.iterations == values["recipe"]["rounding"]["iterations"]
        own = values["rows"][name].get("data", {})
        assert data.n_samples == own.get("n_samples", values["data"]["n_samples"])
        assert recipe.rounding.learned == (name == "fp32" or "closed_form" not in name)


def test_changes_reach_only_what_they_name() -> None:
    assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}, "e": {"f": 5}}) == {
        "a": {"b": 1, "c": 4},
        "d": 3,
        "e": {"f": 5},
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": {"config": "no_such"}}, "no_such"),
        ({"a": {"recipe": {"weights": {"formats": "fp5"}}}}, "fp5"),
        ({"a": {"recipe": {"colour": 1}}}, "row a: .*colour"),
        ({"a/b": {}}, "cannot be the name of a row"),
    ],
)
def test_a_row_that_makes_no_sense_is_one_clear_line(
    rows: dict[str, Any], message: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(grid(model, tmp_path, **rows)))
    outcome = run_fpq(capsys, ["study", "--config", str(file)])
    assert outcome.code != 0
    assert "Traceback" not in outcome.err
    assert re.search(message, outcome.err)
    assert not (tmp_path / "study").exists()


def test_an_unknown_row_is_named(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(grid(model, tmp_path, **ROWS), sort_keys=False))
    outcome = run_fpq(capsys, ["study", "--config", str(file), "--only=[fp9]"])
    assert outcome.code != 0
    assert "no row 'fp9'; it has fp32, fp8, fp4" in outcome.err


# --- trajectories ----------------------------------------------------------------------------------------------


def test_errors_along_the_trajectory_are_those_of_the_denoiser_and_of_the_states() -> None:
    pipeline, sampler, seeds = tiny_pipeline(), SamplerConfig("DDIMScheduler", steps=4, batch_size=3), range(3)
    pipeline.unet.requires_grad_(False)
    layer = make_quantized(pipeline.unet.conv_in, Granularity("tensor"))
    rows = layer.weight_rows()[0]
    weight: Quantizer = search_tensor_error(rows, parse_formats("e2m1"))
    layer.variants["nearest"] = LayerQuantization([weight])
    found = trajectory_errors(pipeline, sampler, seeds, "nearest")
    assert len(found["timesteps"]) == len(found["output"]) == len(found["state"]) == 4
    assert found["timesteps"] == sorted(found["timesteps"], reverse=True)
    assert found["state"][0] == 0  # the same noise
    assert all(error > 0 for error in found["output"] + found["state"][1:])

    # By hand: DDIM on both models, a step at a time.
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(4)
    start = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
    states, output_errors, state_errors = [start, start.clone()], [], []
    with torch.no_grad():
        for t in scheduler.timesteps:
            state_errors.append(((states[1] - states[0]) ** 2).mean() / (states[0] ** 2).mean())
            outputs = []
            for mode, state in zip(
                ("full_precision", "nearest", "nearest"), (states[0], states[1], states[0]), strict=True
            ):
                layer.set_mode(mode)  # type: ignore[arg-type]
                outputs.append(pipeline.unet(state, t).sample)
            output_errors.append(((outputs[2] - outputs[0]) ** 2).mean() / (outputs[0] ** 2).mean())
            states = [scheduler.step(outputs[i], t, states[i]).prev_sample for i in (0, 1)]
    assert found["output"] == pytest.approx([e.item() for e in output_errors], rel=1e-3)
    assert found["state"] == pytest.approx([e.item() for e in state_errors], rel=1e-3)


def test_a_study_needs_images() -> None:
    with pytest.raises(ValueError, match="n_images of at least 2"):
        StudyConfig("m", "o", {}, evaluation=EvaluationConfig(n_images=0))
