"""The shipped configurations parse, and every recipe runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from models import CHECKOUT, fit_arguments, run_fpq, save_tiny, tiny_text_to_image

STUDIES = sorted((CHECKOUT / "configs" / "study").glob("*.yaml"))
CONFIGS = sorted({*(CHECKOUT / "configs").rglob("*.yaml")} - {*STUDIES})
MODELS = [file for file in CONFIGS if file.parent.name == "models"]
RECIPES = [file for file in CONFIGS if file.parent.name == "recipes"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def _leaves(value: object, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, child in value.items() for k, v in _leaves(child, (*path, key)).items()}


def test_there_are_configurations() -> None:
    assert len(RECIPES) >= 5
    assert CHECKOUT / "configs" / "quickstart.yaml" in CONFIGS


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
@pytest.mark.parametrize("by", ["path", "name"])
def test_a_configuration_parses_to_the_values_it_holds(
    file: Path, by: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CHECKOUT)  # the quickstart names its data relative to the checkout
    name = str(file) if by == "path" else file.stem
    outcome = run_fpq(capsys, ["fit", "--config", name, "--model", "X", "--print_config"])
    assert outcome.code == 0, outcome.err
    found = _leaves(yaml.safe_load(outcome.out))
    expected = {**_leaves(yaml.safe_load(file.read_text())), ("model",): "X"}
    assert {k: found.get(k) for k in expected} == expected


@pytest.mark.parametrize("file", MODELS, ids=lambda f: f.stem)
def test_the_configuration_of_a_model_runs_with_a_small_stand_in(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(file.read_text())
    assert values["model"].count("/") == 1  # as users know it
    takes_prompts = "prompts" in values["sampler"]
    stand_in = tiny_text_to_image(tmp_path / "tiny") if takes_prompts else save_tiny(tmp_path / "tiny")
    command, *options = fit_arguments(stand_in, tmp_path / "run", iterations=2, n_images=2)
    options += ["--sampler.prompts=['a cat','a dog']", "--sampler.scheduler=DDIMScheduler"] if takes_prompts else []
    outcome = run_fpq(capsys, [command, "--config", file.stem, *options])
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["quantized_share"] > 0.9


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_a_recipe_runs_end_to_end(file: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, *options = fit_arguments(model, tmp_path / "run", iterations=5)
    outcome = run_fpq(capsys, [command, "--config", file.stem, *options])
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    recipe = yaml.safe_load(file.read_text())["recipe"]
    assert report["recipe"]["weights"]["formats"] == recipe["weights"]["formats"]
    assert all(0 < b["error_quantized"] <= b["error_nearest"] < 1 for b in report["blocks"])
    used = {f for b in report["blocks"] for names in b["weight_formats"].values() for f in names}
    inputs = {f for b in report["blocks"] for names in b["activation_formats"].values() for f in names}
    if file.stem == "fp8_fp8_hardware":
        assert (used, inputs) == ({"float8_e4m3fn"}, {"float8_e4m3fn"})
    elif "hardware" in file.stem or file.stem in ("nvfp4", "mxfp4"):
        assert (used, inputs) == ({"float4_e2m1fn"}, {"float8_e4m3fn"})
    elif "int" in file.stem:
        assert (used, inputs) == ({"uint4"}, {"uint8"})
    else:
        assert used <= {"e2m1", "e1m2", "e3m0", "e5m2", "e4m3", "e3m4", "e2m5"}
        assert any(name.startswith("u") for name in inputs) == (file.stem == "fp8_fp8")
