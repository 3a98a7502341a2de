"""The last lines of ``fpq fit``."""

from __future__ import annotations

from typing import Any

import torch

from fpq_lightning.evaluation.metrics import table_columns
from fpq_lightning.nn.backends.hardware import Hardware, hardware_of
from fpq_lightning.storage.inspect import inspect_pipeline, low_bit_share
from fpq_lightning.training.estimate import format_size
from fpq_lightning.training.run_directory import RunDirectory
from fpq_lightning.utils.digests import read_json_with_digest


def run_summary(run: RunDirectory, parameters: int) -> list[str]:
    """Where the results of a finished run are, quality, sizes, share of operations in low bits, and the next command.

    Args:
        run: the run.
        parameters: of its denoiser.
    """
    report = read_json_with_digest(run.report)
    size = f"{format_size(report['disk_bytes'])} in files, {format_size(2 * parameters)} in half precision"
    found = {
        "quantized model": str(run.quantized),
        "report": str(run.path / "report.html"),
        "quality": _quality(report["variants"]),
        "size of the denoiser": size,
        "low-bit operations": _low_bit_operations(run),
        "next": f"fpq test --model {run.quantized}",
    }
    return [f"{name + ':':<22}{value}" for name, value in found.items() if value]


def _quality(variants: dict[str, dict[str, Any]]) -> str:
    def measured(variant: str) -> str:
        values = {key: value for key, value in variants[variant].items() if value is not None}
        columns = [column for column in table_columns(values) if column.headline]
        return ", ".join(f"{c.title} {c.cell(values[c.key])} {c.unit}".rstrip() for c in columns)

    return f"{measured('quantized')} (nearest rounding: {measured('nearest')})" if "quantized" in variants else ""


def _low_bit_operations(run: RunDirectory) -> str:
    """A share, empty where the model cannot be inspected, for which no finished run is to fail."""
    if torch.cuda.is_available():
        device = torch.device("cuda")
        name, hardware = torch.cuda.get_device_name(device), hardware_of(device)
    else:
        name, hardware = "an H100", Hardware((9, 0), kernels=True)
    try:
        share = low_bit_share(inspect_pipeline(run.quantized, hardware, torch.bfloat16))
    except Exception:  # whatever a pipeline may raise
        return ""
    return f"{share:.0%} on {name}: see fpq inspect {run.quantized}"
