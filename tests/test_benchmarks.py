"""The benchmark of full-size models, on small ones of the same classes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from models import CHECKOUT

SMALL = ["--scale=tiny", "--cpu", "--samples=32", "--measured=8", "--iterations=30", "--batch_size=4"]
SMALL += ["--step_seconds=0"]


@pytest.fixture(scope="module")
def full_size() -> ModuleType:
    spec = importlib.util.spec_from_file_location("full_size", CHECKOUT / "benchmarks" / "full_size.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["full_size"] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


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
