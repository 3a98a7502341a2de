"""The key of a calibration set tells sets apart that differ, and no others."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from fpq_lightning.calibration.key import CalibrationKey

KEY = CalibrationKey(
    model_weights="abc",
    n_samples=16,
    seed=3,
    source="trajectories",
    image_column="image",
    timesteps="uniform",
    weighting="sensitivity",
    sampler={"steps": 4, "prompts": None, "batch_size": 2},
)
OTHER: dict[str, Any] = {
    "model_weights": "abd",
    "n_samples": 17,
    "seed": 4,
    "source": "images",
    "image_column": "picture",
    "timesteps": "late",
    "weighting": "uniform",
    "sampler": {"steps": 5, "prompts": None, "batch_size": 2},
}


def test_every_field_is_tried() -> None:
    assert OTHER.keys() == {field.name for field in fields(KEY)}


@pytest.mark.parametrize("name", OTHER)
def test_a_set_that_differs_in_one_field_is_told_apart_and_the_field_named(name: str) -> None:
    other = replace(KEY, **{name: OTHER[name]})
    assert other != KEY
    assert other.digest != KEY.digest
    (difference,) = KEY.differences(json.loads(json.dumps(other.to_dict())))
    named = {"model_weights": "model", "sampler": "sampler.steps"}.get(name, name)
    assert difference.startswith(f"{named}: ")


def test_the_file_beside_a_set_keeps_its_contents() -> None:
    assert KEY.to_dict() == {
        "model": "abc",
        "n_samples": 16,
        "seed": 3,
        "source": "trajectories",
        "image_column": "image",
        "timesteps": "uniform",
        "weighting": "sensitivity",
        "sampler": {"steps": 4, "prompts": None, "batch_size": 2},
    }
    assert KEY.differences(KEY.to_dict()) == []
    assert replace(KEY) == KEY


def test_equal_keys_have_equal_digests_whatever_the_order_of_the_sampler() -> None:
    again = replace(KEY, sampler=dict(reversed(KEY.sampler.items())))
    assert again.digest == KEY.digest
