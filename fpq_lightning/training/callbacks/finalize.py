"""Writing the quantized pipeline."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from fpq_lightning.evaluation.statistics import weight_statistics
from fpq_lightning.storage.pipeline import save_quantized
from fpq_lightning.training.denoisers import Denoiser
from fpq_lightning.training.module import BlockReconstruction
from fpq_lightning.training.run_directory import RunDirectory
from fpq_lightning.utils.side_work import side_work


class FinalizeQuantization(pl.Callback):
    """At the end of the calibration writes ``quantized/``.

    Args:
        run: where it goes.
        base_model: path or hub id of the full-precision model.
    """

    def __init__(self, run: RunDirectory, base_model: str) -> None:
        self.run = run
        self.base_model = base_model

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the pipeline atomically."""
        assert isinstance(pl_module, BlockReconstruction)
        if not pl_module.plan.finished:
            return
        details, of_each = self.details(pl_module), self.of_each(pl_module)
        save_quantized(pl_module.pipeline, self.run.quantized, details, of_each=of_each)

    def details(self, module: BlockReconstruction) -> dict[str, Any]:
        """What the files say of where they come from."""
        details: dict[str, Any] = {
            "base_model": self.base_model,
            "recipe": module.recipe.to_dict(),
            "version": version("fpq-lightning"),
            "fingerprint": self.run.fingerprint,
            "sampler": module.data.sampler.kept(),
        }
        if arguments := self.run.parts["model"].get("pipeline_arguments"):
            details["pipeline_arguments"] = arguments
        return details

    def of_each(self, module: BlockReconstruction) -> dict[str, dict[str, Any]]:
        """What the files say of each denoiser, by component."""
        return {denoiser.name: _of(denoiser) for denoiser in module.denoisers}


def _of(denoiser: Denoiser) -> dict[str, Any]:
    found: dict[str, Any] = {"coverage": asdict(denoiser.coverage)}
    with side_work("statistics of the weights"):
        found |= weight_statistics(denoiser.network)
    return found
