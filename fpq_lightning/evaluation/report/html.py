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
from torch.nn.functional import avg_pool2d, pad

from fpq_lightning.diffusion.media import FRAME_MILLISECONDS, IMAGE, SOUND, VIDEO, medium_of, to_bytes, wav, webp
from fpq_lightning.evaluation.metrics import METRICS
from fpq_lightning.evaluation.report.figures import formats_by_depth, ranges_over_timesteps, unit_errors, zeros_by_layer
from fpq_lightning.evaluation.report.markdown import (
    kept_phrase,
    quality_notes,
    recipe_phrase,
    variant_label,
    variant_rows,
)
from fpq_lightning.evaluation.report.pictures import draw_samples

_COLUMNS = 8
_ROWS = 3  # videos or sounds of each variant on the page
_SECONDS = 4  # of each
_LARGEST = 256  # pixels of the longer side of a video, which is averaged down to it
_GAP = 4  # pixels between videos
_SMALLEST = 72  # least width of an image on the page, in pixels


def _data_url(contents: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(contents).decode()}"


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
    return _data_url(buffer.getvalue(), "image/png")


def _clips(samples: Mapping[str, Tensor]) -> str:
    """The first videos of each variant side by side, a row for each seed, as the data URL of one animated WebP.

    One picture, so that all move together.
    """
    columns = [videos[:_ROWS, : _SECONDS * 1000 // FRAME_MILLISECONDS].nan_to_num() for videos in samples.values()]
    smaller = -(-max(columns[0].shape[-2:]) // _LARGEST)
    if smaller > 1:
        columns = [torch.stack([avg_pool2d(video, smaller) for video in videos]) for videos in columns]
    grid = torch.cat([pad(torch.cat(list(videos), dim=-2), (0, _GAP), value=1) for videos in columns], dim=-1)
    return _data_url(webp(grid, lossless=False), "image/webp")


def _players(samples: Mapping[str, Tensor], sampling_rate: int) -> list[list[str]]:
    """The beginnings of the first sounds as data URLs of WAV files: a row for each seed, a column for each variant."""
    columns = [sounds[:_ROWS, :, : _SECONDS * sampling_rate].nan_to_num() for sounds in samples.values()]
    return [[_data_url(wav(sound, sampling_rate), "audio/wav") for sound in row] for row in zip(*columns, strict=True)]


def _spectrograms(samples: Mapping[str, Tensor], sampling_rate: int) -> str:
    """Those of the sounds that are played, as the data URL of a PNG."""
    shown = {name: sounds[:_ROWS] for name, sounds in samples.items()}
    return _data_url(draw_samples(shown, sampling_rate), "image/png")


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
        samples: images, videos, sounds or latents, as `sample` gives them, by variant, ``full_precision`` among them.
    """
    medium = medium_of(next(iter(samples.values()))) if samples else IMAGE
    loader = PackageLoader("fpq_lightning.evaluation.report")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    images = samples if medium is IMAGE else {}
    width = next((x.shape[-1] for x in images.values()), 0)
    sheets = {name: _sheet(x) for name, x in images.items()}
    reference = sheets.pop("full_precision", None)
    in_a_row = min(_COLUMNS, max((len(x) for x in images.values()), default=0))
    columns, rows = variant_rows(report["variants"])
    return environment.get_template("report.html.j2").render(
        report=report,
        medium=medium,
        labels=[variant_label(name) for name in samples],
        clips=_clips(samples) if medium is VIDEO else None,
        players=_players(samples, report["sampling_rate"]) if medium is SOUND else None,
        spectrograms=_spectrograms(samples, report["sampling_rate"]) if medium is SOUND else None,
        seconds=_SECONDS,
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
