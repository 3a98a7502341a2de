"""Configurations are inert: making one opens no file and changes nothing that it is given."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from fpq_lightning.diffusion.sampling import SamplerConfig
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.quantization.recipe import ActivationRecipe, AttentionRecipe, Recipe, RoundingRecipe, WeightRecipe
from fpq_lightning.study.config import RowConfig, StudyConfig

_opened: list[Any] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(arguments[0])


sys.addaudithook(_audit)  # cannot be removed: it does nothing outside of the tests of this file


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    """Files that are opened during a test."""
    global _opened
    SamplerConfig()  # diffusers imports a scheduler when it is first looked up
    _opened = []
    yield _opened
    _opened = None


def test_making_a_configuration_opens_no_file(opened: list[Any], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    opened.clear()
    for prompts in (str(tmp_path / "prompts.txt"), "/none.csv", "no/such/dataset"):
        sampler = SamplerConfig(prompts=prompts)
    evaluation = EvaluationConfig(inception="/none.pth", clip="/none", real="/none.parquet", lpips="alex")
    EvaluationConfig(features="/none", real="/none.safetensors")
    Recipe(components={"vae": "fp8"}, attention=AttentionRecipe("fp8"))
    StudyConfig("/none", "/none", {"a": RowConfig(config="no_such_recipe")}, sampler, evaluation)
    assert opened == []
    sampler.prompts = str(tmp_path / "prompts.txt")
    sampler.check()
    assert str(tmp_path / "prompts.txt") in map(str, opened)


def test_making_a_configuration_changes_nothing_that_it_is_given() -> None:
    given: dict[str, Any] = {
        "weights": WeightRecipe(["e2m1", "e1m2"]),
        "activations": ActivationRecipe(token_layers="to_out.*"),
        "rounding": RoundingRecipe(start="nearest", learned=True, iterations=3),
        "include": ["down.*"],
        "exclude": "conv_in",
        "components": {"vae": "fp8"},
    }
    before = deepcopy(given)
    recipe = Recipe(**given)
    assert given == before
    assert recipe.exclude == ["conv_in"]
    assert recipe.has_token_scales("to_out.0")
    assert not recipe.has_token_scales("to_in.0")
    rows = {"a": RowConfig(recipe={"exclude": ["b"]})}
    study: dict[str, Any] = {"rows": rows, "recipe": {"exclude": ["c"]}, "data": {"n_samples": 8}}
    before = deepcopy(study)
    config = StudyConfig("m", "o", **study)
    assert config.build("a")[0].exclude == ["b"]
    assert study == before
