"""The report of a calibration."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from fpq_lightning.diffusion.outputs import sampling_rate
from fpq_lightning.evaluation.report.files import write_reports
from fpq_lightning.evaluation.statistics import activation_ranges, layer_statistics, weight_statistics
from fpq_lightning.nn.coverage import total
from fpq_lightning.training.callbacks.image_quality import ImageQuality
from fpq_lightning.training.denoisers import Denoiser
from fpq_lightning.training.module import BlockReconstruction
from fpq_lightning.training.run_directory import RunDirectory
from fpq_lightning.utils.files import weights_size
from fpq_lightning.utils.peak_memory import peak_memory
from fpq_lightning.utils.provenance import device_name, versions
from fpq_lightning.utils.side_work import side_work


class RunReport(pl.Callback):
    """At the end of a run writes `samples.png`, `report.md`, `report.html` and, last, `report.json`.

    Args:
        run: where the report goes.
        quality: the callback that measures image quality, which must run before this one.
    """

    def __init__(self, run: RunDirectory, quality: ImageQuality) -> None:
        self.run = run
        self.quality = quality
        self._calibration_peak = 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remembers the peak memory before images are sampled."""
        self._calibration_peak = peak_memory(pl_module.device)

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the reports."""
        assert isinstance(pl_module, BlockReconstruction)
        if not pl_module.plan.finished:
            return
        rate = sampling_rate(pl_module.pipeline)
        write_reports(self.run.path, self.report(pl_module), self.quality.samples, rate)

    def report(self, module: BlockReconstruction) -> dict[str, Any]:
        """The contents of `report.json`."""
        calibration = module.data
        found: dict[str, Any] = {}
        with side_work("statistics of the weights"):
            layers = layer_statistics(module.denoiser)
            found = {**weight_statistics(module.denoiser, layers), "layers": layers}
        each = {denoiser.name: self._of(denoiser, module) for denoiser in module.denoisers}
        if len(each) == 1:
            found |= next(iter(each.values()))
        else:
            found["coverage"] = asdict(total({denoiser.name: denoiser.coverage for denoiser in module.denoisers}))
            found["disk_bytes"] = sum(one["disk_bytes"] for one in each.values())
            found["denoisers"] = each
        return {
            "fingerprint": self.run.fingerprint,
            "model": self.run.parts["model"]["name"],
            "recipe": self.run.parts["recipe"],
            "variants": self.quality.variants,
            "blocks": [asdict(report) for report in module.reports],
            "calibration": {
                "seconds": sum(report.seconds for report in module.reports) + calibration.sampling_seconds,
                "peak_memory_bytes": self._calibration_peak,
                "samples": calibration.n,
                "seeds": [calibration.seed],
            },
            **found,
            "device": device_name(module.device),
            "versions": versions(),
        }

    def _of(self, denoiser: Denoiser, module: BlockReconstruction) -> dict[str, Any]:
        """What the report says of one denoiser."""
        found: dict[str, Any] = {"coverage": asdict(denoiser.coverage)}
        module.placement.calibrate(None, denoiser.name)  # it may be in host memory
        with side_work("activation ranges"):
            found["activation_ranges"] = activation_ranges(
                denoiser.network, module.data.sets[denoiser.name], module.data.sampler.batch_size, module.device
            )
        return {**found, "disk_bytes": weights_size(self.run.quantized / denoiser.name)}
