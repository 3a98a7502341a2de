"""Computing the rows of a study."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from fpq_lightning.api import quantize
from fpq_lightning.calibration.key import CalibrationKey
from fpq_lightning.diffusion.denoisers import as_one, find_denoisers, quantized_denoisers
from fpq_lightning.diffusion.images import ImageDirectory
from fpq_lightning.diffusion.outputs import sampling_rate
from fpq_lightning.diffusion.pipelines import load_pipeline, move_pipeline
from fpq_lightning.evaluation.evaluator import Evaluator
from fpq_lightning.evaluation.sampling import image_settings, sample_variant
from fpq_lightning.evaluation.statistics import weight_statistics
from fpq_lightning.nn.calibrated import Mode
from fpq_lightning.nn.hashing import hash_weights
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.study.config import StudyConfig, complete
from fpq_lightning.study.row import read_row
from fpq_lightning.study.table import check_table
from fpq_lightning.study.trajectory import trajectory_errors
from fpq_lightning.training.datamodule import CalibrationDataModule
from fpq_lightning.utils.digests import with_digest
from fpq_lightning.utils.files import differences, shorten, write_json
from fpq_lightning.utils.places import check_writable
from fpq_lightning.utils.provenance import device_name, fingerprint, versions
from fpq_lightning.utils.tf32 import using_tf32

logger = logging.getLogger(__name__)

_QUANTIZED: tuple[Mode, ...] = ("nearest", "quantized")


class Study:
    """Computes the rows of a study that do not exist yet; what rows share is computed once.

    Args:
        config: the study.
        device: the compute device.

    Raises:
        FileNotFoundError: if something that evaluation needs is missing.
        ValueError: if a row cannot be built, or an existing row was made with other settings.
    """

    def __init__(self, config: StudyConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.output = Path(config.output)
        self.built = {name: config.build(name) for name in config.rows}
        self.evaluator = Evaluator(config.evaluation, config.sampler)
        self.evaluator.check()
        check_table(self.output)
        check_writable(config.scratch, "scratch")
        pipeline = load_pipeline(config.model)
        self._weights = hash_weights(as_one(find_denoisers(pipeline)))
        self.scratch = Path(config.scratch) / self._weights[:8]
        self.settings = {key: self._settings(*key) for key in self._keys()}
        for key, settings in self.settings.items():
            self._check(self.file(*key), settings)

    def _pipeline(self) -> DiffusionPipeline:
        return load_pipeline(self.config.model).to(self.device)

    def _keys(self) -> Iterator[tuple[str, str]]:
        for name, row in self.config.rows.items():
            for variant in row.variants:
                yield name, str(variant)

    def file(self, name: str, variant: str) -> Path:
        """The file of a row."""
        return self.output / "rows" / f"{name}.{variant}.json"

    def _settings(self, name: str, variant: str) -> dict[str, Any]:
        """Everything that decides a row."""
        evaluation = self.config.evaluation
        judged = {"n_images": evaluation.n_images, "seed": evaluation.seed, "real": evaluation.real}
        images = image_settings(self._weights, self.config.sampler)
        settings: dict[str, Any] = {"variant": variant, "images": images, "evaluation": judged}
        if variant in _QUANTIZED:
            recipe, data = self.built[name]
            settings |= {"recipe": recipe.to_dict(), "data": data.identity(), "tf32": self.config.tf32}
        return json.loads(json.dumps(settings))

    def _check(self, file: Path, settings: dict[str, Any]) -> None:
        if os.path.lexists(file) and (changed := differences(complete(read_row(file).get("settings", {})), settings)):
            raise ValueError(f"{file} was made with other settings ({shorten(changed)}): delete it or rename the row")

    def missing(self, only: Sequence[str] = ()) -> dict[str, list[str]]:
        """Variants that are not computed yet, by row.

        Raises:
            ValueError: if `only` names a row that does not exist.
        """
        if unknown := [name for name in only if name not in self.config.rows]:
            raise ValueError(f"the study has no row {unknown[0]!r}; it has {', '.join(self.config.rows)}")
        found: dict[str, list[str]] = {}
        for name, variant in self._keys():
            if (not only or name in only) and not os.path.lexists(self.file(name, variant)):
                found.setdefault(name, []).append(variant)
        return found

    def run(self, only: Sequence[str] = ()) -> None:
        """Computes what is missing and writes the file of each row as soon as it is finished."""
        for name, variants in self.missing(only).items():
            if full_precision := [variant for variant in variants if variant not in _QUANTIZED]:
                self._full_precision(name, full_precision)
            if quantized := [variant for variant in _QUANTIZED if variant in variants]:
                self._recipe(name, quantized)

    # --- rows --------------------------------------------------------------------------------------------------

    def _images(self, pipeline: DiffusionPipeline, mode: Mode, seeds: range) -> torch.Tensor:
        directory = None
        if mode == "full_precision":
            settings = image_settings(self._weights, self.config.sampler)
            directory = ImageDirectory(self.scratch / "full_precision", settings)
        return sample_variant(pipeline, self.config.sampler, seeds, mode, directory=directory)

    def _write(self, name: str, variant: str, values: dict[str, Any]) -> None:
        row = {
            "name": name,
            "variant": variant,
            "group": self.config.rows[name].group,
            "model": self.config.model,
            **values,
            "settings": self.settings[name, variant],
            "hardware": device_name(self.device),
            "versions": versions(),
            "date": str(date.today()),
        }
        write_json(self.file(name, variant), with_digest(row))
        shown = {k: round(v, 3) for k, v in values["metrics"].items() if isinstance(v, float)}
        logger.info("%s (%s): %s", name, variant, shown)

    def _full_precision(self, name: str, variants: list[str]) -> None:
        pipeline, seeds = self._pipeline(), self.config.evaluation.seeds
        reference = self._images(pipeline, "full_precision", seeds)
        for variant in variants:
            same = variant == "full_precision"
            judged = seeds if same else range(seeds.stop, seeds.stop + len(seeds))
            images = reference if same else self._images(pipeline, "full_precision", judged)
            metrics = self.evaluator.compare(images, judged, reference, self.device, same, sampling_rate(pipeline))
            self._write(name, variant, {"metrics": metrics})

    def _recipe(self, name: str, variants: Sequence[Mode]) -> None:
        recipe, data = self.built[name]
        pipeline, start = self._pipeline(), time.perf_counter()
        self._calibrate(name, pipeline, recipe, data)
        seconds = time.perf_counter() - start
        move_pipeline(pipeline, self.device)
        seeds = self.config.evaluation.seeds
        reference = self._images(pipeline, "full_precision", seeds)
        shared = {
            **weight_statistics(as_one(quantized_denoisers(pipeline))),
            "weights": recipe.weights.formats,
            "activations": recipe.activations.formats,
            "iterations": recipe.rounding.iterations if recipe.rounding.learned else 0,
            "samples": data.n_samples,
            "calibration_seconds": seconds,
        }
        for variant in variants:
            images = self._images(pipeline, variant, seeds)
            rate = sampling_rate(pipeline)
            metrics = self.evaluator.compare(images, seeds, reference, self.device, sampling_rate=rate)
            values = {**shared, "metrics": metrics}
            if n := self.config.trajectories:
                first = range(seeds.start, seeds.start + n)
                values["trajectory"] = trajectory_errors(pipeline, self.config.sampler, first, variant)
            self._write(name, variant, values)

    def _calibrate(self, name: str, pipeline: DiffusionPipeline, recipe: Recipe, data: CalibrationDataModule) -> None:
        weights = hash_weights(as_one(find_denoisers(pipeline, recipe.denoisers)))
        key = CalibrationKey.of(data, self.config.sampler, weights)
        data.directory = data.directory or str(self.scratch / f"calibration-{key.digest}")
        run_dir = self.scratch / "runs" / fingerprint(self._settings(name, "quantized"))
        (run_dir / "report.json").unlink(missing_ok=True)  # reopens a finished run whose rows were not written
        with using_tf32(self.config.tf32):
            quantize(
                pipeline,
                recipe,
                run_dir,
                data,
                self.config.sampler,
                base_model=self.config.model,
                ckpt_path="last",
                accelerator="cpu" if self.device.type == "cpu" else "auto",
                logger=False,
            )
