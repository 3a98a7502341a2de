"""The reports that a run ends with."""

from __future__ import annotations

import resource
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

from fpq_lightning.callbacks.image_quality import ImageQuality
from fpq_lightning.layers import LayerQuantization, quantized_layers
from fpq_lightning.reconstruction.module import BlockReconstruction
from fpq_lightning.report.markdown import render_markdown
from fpq_lightning.report.pictures import save_samples
from fpq_lightning.runs import RunDirectory, versions
from fpq_lightning.storage.files import whole_file, write_json

SCHEMA_VERSION = 1


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def weight_statistics(module: torch.nn.Module) -> dict[str, float | None]:
    """Bits a weight (codes and scales) and share of exact zeros over the quantized weights, and their share of all.

    The first two are None without any.
    """
    bits = zeros = total = 0.0
    for layer in quantized_layers(module).values():
        quantization = dict(layer.variants.items()).get("learned")
        if not isinstance(quantization, LayerQuantization) or not quantization.weights:
            continue
        weight = layer.quantized_weight(quantization)
        total += weight.numel()
        zeros += (weight == 0).sum().item()
        for quantizer, rows in zip(quantization.weights, layer.weight_rows(), strict=True):
            extra = [t for t in (quantizer.scale, quantizer.offset) if t is not None]
            bits += rows.numel() * quantizer.format.bits + 32 * sum(t.numel() for t in extra)
    every = sum(
        p.numel() for name, p in module.named_parameters() if name.endswith("weight") and ".variants." not in name
    )
    return {
        "weight_bits": bits / total if total else None,
        "sparsity": zeros / total if total else None,
        "quantized_share": total / every,
    }


class RunReport(pl.Callback):
    """At the end of a run writes `samples.png`, `report.md` and, last, `report.json`.

    Args:
        run: where to.
        quality: the callback that judged the images.
    """

    def __init__(self, run: RunDirectory, quality: ImageQuality) -> None:
        self.run = run
        self.quality = quality
        self._calibration_peak = 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remembers the peak before images are sampled."""
        self._calibration_peak = peak_memory(pl_module.device)

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the reports."""
        assert isinstance(pl_module, BlockReconstruction)
        if not pl_module.finished:
            return
        report = self.report(pl_module)
        if self.quality.samples:
            with whole_file(self.run.path / "samples.png") as temporary:
                save_samples(self.quality.samples, temporary)
        with whole_file(self.run.path / "report.md") as temporary:
            temporary.write_text(render_markdown(report))
        write_json(self.run.report, report)

    def report(self, module: BlockReconstruction) -> dict[str, Any]:
        """The contents of `report.json`."""
        calibration = module.calibration
        return {
            "schema_version": SCHEMA_VERSION,
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
            **weight_statistics(module.denoiser),
            "device": torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else "cpu",
            "versions": versions(),
        }
