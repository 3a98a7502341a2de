"""The configuration of a study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from fpq_lightning.diffusion.sampling import SamplerConfig
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.training.datamodule import CalibrationDataModule
from fpq_lightning.utils.files import paths_to_text
from fpq_lightning.utils.resources import find_config
from fpq_lightning.utils.values import CountOrZero, check_values


@dataclass
class RowConfig:
    """One calibration of a study, with a row of the table for each variant.

    Attributes:
        config: recipe to start from: the name of a shipped one, or a file; null starts from the defaults.
        recipe: changes to the recipe.
        data: changes to the calibration data.
        variants: variants to evaluate. ``full_precision`` and ``other_seeds`` are the model itself; the latter shows
            the noise between two sets of images.
        group: heading of the row in the table.
    """

    config: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    variants: list[Literal["full_precision", "other_seeds", "nearest", "quantized"]] = field(
        default_factory=lambda: ["nearest", "quantized"]
    )
    group: str = "recipes"

    def __post_init__(self) -> None:
        check_values(self, "rows")


@dataclass
class StudyConfig:
    """A grid of recipes on one model.

    Attributes:
        model: directory or hub id.
        output: directory of the rows, the table and the figures.
        rows: rows by name.
        sampler: how images are sampled.
        evaluation: what quality is measured on.
        recipe: recipe of all rows, which a row may change.
        data: calibration data of all rows, which a row may change.
        trajectories: number of seeds for the error along the trajectory; 0 leaves it out.
        scratch: directory of calibration sets, images and runs that rows share; it may be deleted.
        tf32: allow TF32 products during calibration; evaluation never uses them.
    """

    model: str
    output: str
    rows: dict[str, RowConfig]
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trajectories: CountOrZero = 64
    scratch: str = "runs/study"
    tf32: bool = True

    def __post_init__(self) -> None:
        paths_to_text(self)
        check_values(self, "")
        if self.evaluation.n_images < 2:
            raise ValueError("a study needs evaluation.n_images of at least 2")
        for name in self.rows:
            if not name or not all(c.isalnum() or c in "-_." for c in name):
                raise ValueError(f"{name!r} cannot be the name of a row: use letters, digits, '-', '_' and '.'")

    def build(self, name: str) -> tuple[Recipe, CalibrationDataModule]:
        """Recipe and calibration data of a row.

        Raises:
            FileNotFoundError: if there is no such recipe.
            ValueError: if the row has unknown options or unusable values.
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
    """Settings of a row, filled up with the defaults of options that are newer than the row."""
    defaults = {"recipe": Recipe().to_dict(), "data": CalibrationDataModule().identity()}
    return merge({key: value for key, value in defaults.items() if key in settings}, settings)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings merged: `changes` take precedence over `base`."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged
