"""Options are checked where they are made, from Python as on the command line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from models import run_fpq

from fpq_lightning.diffusion.sampling import SamplerConfig
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.quantization.recipe import (
    ActivationRecipe,
    AttentionRecipe,
    Recipe,
    RoundingRecipe,
    WeightRecipe,
)
from fpq_lightning.study.config import RowConfig
from fpq_lightning.training.datamodule import CalibrationDataModule
from fpq_lightning.utils.values import Count, Within, check_values

OPTIONS: dict[str, type] = {
    "recipe": Recipe,
    "recipe.weights": WeightRecipe,
    "recipe.activations": ActivationRecipe,
    "recipe.attention": AttentionRecipe,
    "recipe.rounding": RoundingRecipe,
    "sampler": SamplerConfig,
    "data": CalibrationDataModule,
    "evaluation": EvaluationConfig,
    "rows": RowConfig,
}


def _holds(hint: Any, kind: Any) -> bool:
    """Whether a part of an annotation is of a kind."""
    return kind in (hint, get_origin(hint)) or any(_holds(one, kind) for one in get_args(hint))


def _fields(kind: Any) -> list[tuple[str, str]]:
    return [
        (option, name)
        for option, made in OPTIONS.items()
        for name, hint in get_type_hints(made.__init__).items()  # type: ignore[misc]
        if _holds(hint, kind)
    ]


@pytest.mark.parametrize(("option", "name"), _fields(Literal))
def test_an_unknown_word_is_refused_with_those_that_are_known(option: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{option}\.{name} must be .*, got 'zz'$"):
        OPTIONS[option](**{name: "zz"})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("option", "name"), [*_fields(float), *_fields(int)])
def test_a_number_that_is_none_is_refused(option: str, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{option}\.{name} must be "):
        OPTIONS[option](**{name: value})


@pytest.mark.parametrize("value", [1e10, 16.5, "16", True])
@pytest.mark.parametrize(("option", "name"), _fields(int))
def test_a_whole_number_is_no_other_one_and_no_text(option: str, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{option}\.{name} must be a whole number"):
        OPTIONS[option](**{name: value})


@pytest.mark.parametrize(("option", "name"), [*_fields(bool)])
def test_a_switch_is_true_or_false(option: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{option}\.{name} must be true or false, got 'false'"):
        OPTIONS[option](**{name: "false"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: RoundingRecipe(learning_rate=-0.1),
        lambda: RoundingRecipe(scale_learning_rate=-1),
        lambda: RoundingRecipe(regularisation=-1.0),
        lambda: RoundingRecipe(straight_through=1.5),
        lambda: RoundingRecipe(iterations=-1),
        lambda: CalibrationDataModule(n_samples=10**10),
        lambda: CalibrationDataModule(micro_batch=0),
        lambda: SamplerConfig(steps=0),
        lambda: SamplerConfig(height=-8),
        lambda: SamplerConfig(arguments={"eta": math.nan}),
        lambda: EvaluationConfig(n_real=0),
        lambda: EvaluationConfig(n_images=-2),
        lambda: WeightRecipe(group_size=-16),
        lambda: Recipe(weights={"formats": "fp4"}),  # type: ignore[arg-type]
        lambda: Recipe(components={"vae": 8}),  # type: ignore[dict-item]
        lambda: ActivationRecipe(formats=["fp8", 3]),  # type: ignore[list-item]
    ],
)
def test_a_value_out_of_its_range_or_of_another_type_is_refused_in_one_line(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"^\S+ must be .*, got .*") as raised:
        make()
    assert "\n" not in str(raised.value)


def test_every_value_that_an_annotation_allows_is_taken() -> None:
    @dataclass
    class Options:
        count: Count | None
        share: Annotated[float, Within(0, 1)]
        names: list[str] | str
        table: dict[str, Any]

    for values in [
        (None, 0, "a", {}),
        (np.int64(3), np.float32(0.5), ("a", "b"), {"x": [1, None]}),
        (2**31 - 1, 1.0, Path("a"), {"x": 1}),
    ]:
        check_values(Options(*values), "options")  # type: ignore[arg-type]


# --- keys of configurations ------------------------------------------------------------------------------------

TWICE = {
    "at the top": ("model: a\nrun_dir: x\nmodel: b\n", "model twice, the second time in line 3"),
    "within a group": ("recipe:\n  weights: {formats: fp4, formats: fp8}\n", "recipe.weights.formats twice"),
    "a whole group": ("data:\n  seed: 1\nmodel: a\ndata:\n  seed: 2\n", "data twice, the second time in line 4"),
    "in JSON": ('{"data": {"seed": 1, "seed": 2}}', "data.seed twice"),
}


@pytest.mark.parametrize("words", [["--config", "FILE"], ["--config=FILE"]])
@pytest.mark.parametrize("command", ["fit", "study"])
@pytest.mark.parametrize("case", TWICE)
def test_a_key_that_is_given_twice_is_refused_with_its_name_and_file(
    case: str, command: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = TWICE[case]
    (tmp_path / "config.yaml").write_text(text)
    outcome = run_fpq(capsys, [command, *(word.replace("FILE", str(tmp_path / "config.yaml")) for word in words)])
    assert outcome.code == 1
    assert len(outcome.errors) == 1
    assert f"{tmp_path / 'config.yaml'} gives {message}" in outcome.errors[0]


def test_a_key_may_be_given_once_in_each_of_several_places(tmp_path: Path) -> None:
    from fpq_lightning.utils.resources import find_config

    file = tmp_path / "config.yaml"
    file.write_text("recipe:\n  weights: {formats: fp4}\n  activations: {formats: fp8}\nrows: [{a: 1}, {a: 2}]\n")
    assert find_config(file) == str(file)
