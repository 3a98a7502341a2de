"""`report.html`: a single file that loads nothing else."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
from PIL import Image
from torch import Tensor

from fpq_lightning.diffusion.images import to_bytes
from fpq_lightning.evaluation.metrics import METRICS
from fpq_lightning.evaluation.report.figures import formats_by_depth, ranges_over_timesteps, unit_errors, zeros_by_layer
from fpq_lightning.evaluation.report.markdown import (
    kept_phrase,
    quality_notes,
    recipe_phrase,
    variant_label,
    variant_rows,
)

_COLUMNS = 8
_SMALLEST = 72  # least width of an image on the page, in pixels


def _sheet(images: Tensor) -> str:
    """Images `[n, 3, height, width]` in [-1, 1] in rows of eight, as the data URL of a PNG."""
    n, channels, height, width = images.shape
    columns = min(n, _COLUMNS)
    blank = torch.ones(-n % columns, channels, height, width)
    tiles = torch.cat([images.nan_to_num(), blank]).unflatten(0, (-1, columns))
    sheet = tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    pixels = to_bytes(sheet).permute(1, 2, 0).squeeze(-1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figures(report: Mapping[str, Any]) -> list[dict[str, str]]:
    figures = []
    blocks = [b for b in report.get("blocks", []) if b["error_nearest"] is not None]
    if blocks:
        figures += [
            {
                "title": "Error of each unit",
                "text": "Relative to the energy of the unit's full-precision output, on held-out samples.",
                "svg": unit_errors(blocks),
            },
            {
                "title": "Chosen formats",
                "text": "ExMy has x exponent and y mantissa bits; u is unsigned.",
                "svg": formats_by_depth(blocks),
            },
        ]
    of_each = {f" of {name}": one for name, one in report.get("denoisers", {}).items()}
    for of, one in {"": report, **of_each}.items():
        ranges = one.get("activation_ranges", {})
        if not any(layer["clip"] for layer in ranges.get("layers", [])):
            continue
        figures.append(
            {
                "title": f"Activation ranges{of} over timesteps",
                "text": "Largest input of each layer in full precision, relative to the clip of its quantizer: red is "
                "cut off, blue leaves range unused.",
                "svg": ranges_over_timesteps(ranges),
            }
        )
    if report.get("layers"):
        text = "Share of each layer's quantized weights that are exactly zero."
        figures.append({"title": "Zero weights", "text": text, "svg": zeros_by_layer(report["layers"])})
    return figures


def render_html(report: Mapping[str, Any], samples: Mapping[str, Tensor]) -> str:
    """Renders the contents of `report.json`, and images of the same seeds, as one page.

    Args:
        report: contents of `report.json`.
        samples: images `[n, 3, height, width]` in [-1, 1] by variant, ``full_precision`` among them.
    """
    loader = PackageLoader("fpq_lightning.evaluation.report")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    width = next((images.shape[-1] for images in samples.values()), 0)
    sheets = {name: _sheet(images) for name, images in samples.items()}
    reference = sheets.pop("full_precision", None)
    in_a_row = min(_COLUMNS, max((len(images) for images in samples.values()), default=0))
    columns, rows = variant_rows(report["variants"])
    return environment.get_template("report.html.j2").render(
        report=report,
        recipe=recipe_phrase(report["recipe"]) if report.get("recipe") else "",
        kept=kept_phrase(report),
        columns=columns,
        help={column.key: metric.help for metric in METRICS for column in metric.columns},
        rows=rows,
        notes=quality_notes(report["variants"]),
        reference=reference,
        sheets=[{"name": variant_label(name), "source": source} for name, source in sheets.items()],
        sheet_width=in_a_row * width * max(1, math.ceil(_SMALLEST / max(width, 1))),
        figures=_figures(report),
    )
