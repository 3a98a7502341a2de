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
        details: dict[str, Any] = {
            "base_model": self.base_model,
            "recipe": pl_module.recipe.to_dict(),
            "version": version("fpq-lightning"),
            "fingerprint": self.run.fingerprint,
            "sampler": pl_module.data.sampler.kept(),
        }
        each = {denoiser.name: _of(denoiser) for denoiser in pl_module.denoisers}
        save_quantized(pl_module.pipeline, self.run.quantized, details, of_each=each)


def _of(denoiser: Denoiser) -> dict[str, Any]:
    """What the files say of one denoiser."""
    found: dict[str, Any] = {"coverage": asdict(denoiser.coverage)}
    with side_work("statistics of the weights"):
        found |= weight_statistics(denoiser.network)
    return found
