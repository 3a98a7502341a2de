"""The report of ``fpq test``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

from fpq_lightning.diffusion.denoisers import quantized_denoisers
from fpq_lightning.diffusion.outputs import sampling_rate
from fpq_lightning.evaluation.report.files import write_reports
from fpq_lightning.storage.pipeline import is_quantized, read_descriptions
from fpq_lightning.training.generation import ImageGeneration
from fpq_lightning.utils.files import weights_size
from fpq_lightning.utils.provenance import device_name, versions

logger = logging.getLogger(__name__)

_KEPT = ("weight_bits", "sparsity", "quantized_share", "coverage", "fingerprint", "recipe")


class QualityReport(pl.Callback):
    """At the end of a test writes `samples.png`, `report.md`, `report.html` and, last, `report.json`.

    Args:
        model: directory or hub id of the tested model.
        output: directory of the report.
    """

    def __init__(self, model: str, output: str | Path) -> None:
        self.model = model
        self.output = Path(output)

    @rank_zero_only
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the reports."""
        assert isinstance(pl_module, ImageGeneration)
        assert pl_module.evaluator is not None
        known = list(read_descriptions(self.model).values()) if is_quantized(self.model) else []
        description: dict[str, Any] = known[0] if len(known) == 1 else {}
        denoisers = quantized_denoisers(pl_module.pipeline)
        seeds = pl_module.evaluator.config.seeds
        report = {
            "model": self.model,
            **{name: description[name] for name in _KEPT if name in description},
            "disk_bytes": sum(weights_size(Path(self.model) / name) for name in denoisers),
            "variants": {pl_module.variant: {**pl_module.values, "seeds": [seeds.start, seeds.stop - 1]}},
            "evaluation": pl_module.settings(),
            "device": device_name(pl_module.device),
            "versions": versions(),
        }
        samples = {name: torch.cat(images) for name, images in pl_module.shown.items()}
        write_reports(self.output, report, samples, sampling_rate(pl_module.pipeline))
        logger.info("wrote %s", self.output / "report.html")
