"""What a study consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from fpq_lightning.diffusion.pipelines import SamplerConfig
from fpq_lightning.evaluation.evaluate import EvaluationConfig
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.training.datamodule import CalibrationDataModule
from fpq_lightning.utils.resources import find_config


@dataclass
class RowConfig:
    """One calibration of a study, which gives a row for each variant.

    Attributes:
        config: a recipe to start from: a shipped one by name, or a file; null starts from the defaults.
        recipe: what differs from it.
        data: what differs from its calibration data.
        variants: which ones to judge. ``full_precision`` and ``other_seeds`` are the model itself, the latter the
            noise that a set of images has.
        group: heading under which the table shows the row.
    """

    config: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    variants: list[Literal["full_precision", "other_seeds", "nearest", "learned"]] = field(
        default_factory=lambda: ["nearest", "learned"]
    )
    group: str = "recipes"


@dataclass
class StudyConfig:
    """A grid of recipes on one model.

    Attributes:
        model: directory or hub id.
        output: directory of the rows, the table and the figures.
        rows: by name.
        sampler: how images are sampled.
        evaluation: what quality is measured on.
        recipe: what holds for all rows, unless they say otherwise.
        data: likewise.
        trajectories: seeds for the error along the trajectory; 0 leaves it out.
        scratch: directory of calibration sets, images and runs, which rows share and which may be deleted.
        tf32: whether calibration may use TF32 products; evaluation never does.
    """

    model: str
    output: str
    rows: dict[str, RowConfig]
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trajectories: int = 64
    scratch: str = "runs/study"
    tf32: bool = True

    def __post_init__(self) -> None:
        if self.evaluation.n_images < 2:
            raise ValueError("a study needs evaluation.n_images of at least 2")
        for name in self.rows:
            if not name or not all(c.isalnum() or c in "-_." for c in name):
                raise ValueError(f"{name!r} cannot be the name of a row: use letters, digits, '-', '_' and '.'")

    def build(self, name: str) -> tuple[Recipe, CalibrationDataModule]:
        """Recipe and calibration data of a row.

        Raises:
            ValueError: if the row names something that there is not.
        """
        row = self.rows[name]
        shipped: dict[str, Any] = {}
        if row.config is not None:
            shipped = yaml.safe_load(Path(find_config(row.config)).read_text())
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--recipe", type=Recipe, default=Recipe())
        parser.add_class_arguments(CalibrationDataModule, "data")
        layers = [{key: shipped.get(key, {}) for key in ("recipe", "data")}]
        layers += [{"recipe": self.recipe, "data": self.data}, {"recipe": row.recipe, "data": row.data}]
        merged: dict[str, Any] = {}
        for layer in layers:
            merged = merge(merged, layer)
        try:
            made = parser.instantiate(parser.parse_object(merged))
        except (ArgumentError, TypeError) as error:
            raise ValueError(f"row {name}: {' '.join(str(error).split())[:300]}") from error
        return made.recipe, made.data


def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a row, with options that there were not yet when it was made: they are off by default."""
    defaults = {"recipe": Recipe().to_dict(), "data": CalibrationDataModule().identity()}
    return merge({key: value for key, value in defaults.items() if key in settings}, settings)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with some of them changed."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged
