"""The benchmarks of full-size models, on small ones of the same classes, and of all denoiser classes, on some."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import CHECKOUT

from fpq_lightning.calibration.calibration_set import CalibrationSet

SMALL = ["--scale=tiny", "--cpu", "--samples=32", "--measured=8", "--iterations=30", "--batch_size=4"]
SMALL += ["--step_seconds=0"]


def load(script: str) -> ModuleType:
    name = f"benchmarks.{script}"
    spec = importlib.util.spec_from_file_location(name, CHECKOUT / "benchmarks" / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def full_size() -> ModuleType:
    return load("full_size")


def check_sums(result: dict[str, Any]) -> None:
    """Every unit is of one kind, and the estimate is the sum of what was measured."""
    kinds = result["kinds"]
    assert sum(kind["units"] for kind in kinds) == result["units"]
    assert result["estimate_seconds"]["all"] == pytest.approx(
        result["forwards"] * result["forward_seconds"] + sum(kind["seconds"] for kind in kinds)
    )
    scale = result["samples"] / result["measured_samples"]
    for kind in kinds:
        assert kind["seconds"] == pytest.approx(sum(kind["phases"].values()))
        if not kind["measured"]:
            continue
        total = 0.0
        for run in kind["measured"].values():
            spent = run["seconds"]
            total += spent["load"] + spent["search"] + spent["solvers"] + result["iterations"] * run["step"]
            total += scale * (spent["capture"] + spent["moments"] + spent["finish"] + spent["advance"])
        assert kind["seconds"] == pytest.approx(kind["units"] * total / len(kind["measured"]))


@pytest.mark.parametrize("model", ["sdxl", "flux", "sd15"])
def test_every_kind_of_unit_is_measured_and_the_estimate_is_their_sum(
    model: str, full_size: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found.json"
    result = full_size.main([model, *SMALL, f"--output={output}"])
    check_sums(result)
    assert result["not_measured"] == []
    ends = sum(1 + (model == "flux" and kind["units"] > 1) for kind in result["kinds"])
    assert sum(len(kind["measured"]) for kind in result["kinds"]) == ends
    written = json.loads(output.read_text())
    assert written["estimate_seconds"] == result["estimate_seconds"]
    assert all(sum(v for k, v in size.items() if k != "all") == size["all"] for size in written["store_bytes"].values())
    table = capsys.readouterr().out
    assert all(f"| {kind['kind']} | {kind['units']} |" in table for kind in result["kinds"])


def test_what_there_is_no_time_for_is_taken_from_what_was_measured(
    full_size: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    result = full_size.main(["sd15", *SMALL, "--profile_only", "--profile=mid_block.resnets.0"])
    check_sums(result)
    (measured,) = [kind for kind in result["kinds"] if kind["measured"]]
    (run,) = measured["measured"].values()
    assert len(run["kernels"]) == 12
    others = [kind for kind in result["kinds"] if not kind["measured"]]
    assert result["not_measured"] == [kind["kind"] for kind in others]
    for kind in others:
        assert kind["taken_from"] == measured["kind"]
        one, other = kind["seconds"] / kind["units"], measured["seconds"] / measured["units"]
        assert one / other == pytest.approx(kind["macs"] / measured["macs"])
    assert "| kernel | launches a step |" in capsys.readouterr().out


def test_nothing_is_begun_once_the_time_is_over(full_size: ModuleType) -> None:
    result = full_size.main(["sd15", *SMALL, "--seconds=0"])
    assert len(result["not_measured"]) == len(result["kinds"])
    assert result["estimate_seconds"]["all"] == result["sampling_seconds"]


# --- all denoiser classes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models() -> ModuleType:
    return load("models")


def test_the_table_says_what_became_of_each_class(models: ModuleType, tmp_path: Path) -> None:
    classes = ["WanAnimate2Transformer3DModel", "ChronoEditTransformer3DModel", "TransformerTemporalModel"]
    failed, *good = models.main(["--only", *classes, "--write", str(tmp_path / "models.md")])
    assert [outcome.result for outcome in good] == ["ok", "ok"]
    assert all(outcome.units > 1 and outcome.share > 0.9 for outcome in good)
    assert "kv_cache" in failed.result  # an object with a state of its own
    text = (tmp_path / "models.md").read_text()
    assert "2 of 3 denoiser classes" in text
    assert all(outcome.row() in text for outcome in [failed, *good])


def test_samples_that_depend_on_the_rest_of_their_batch_are_found(models: ModuleType) -> None:
    class Mixing(torch.nn.Module):
        def forward(self, x: torch.Tensor, mixes: bool) -> torch.Tensor:
            return x + x.mean() if mixes else 2 * x

    for mixes in (False, True):
        found = CalibrationSet({"x": torch.randn(3, 4)}, torch.ones(3), {"mixes": mixes})
        assert models.independent(Mixing(), found) != mixes


def test_every_denoiser_class_is_made_tiny(models: ModuleType) -> None:
    for name, kind in models.denoisers().items():
        made = models.make(kind)
        assert sum(parameter.numel() for parameter in made.parameters()) < 5_000_000, name
