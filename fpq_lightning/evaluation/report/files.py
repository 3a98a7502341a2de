"""Writing the files of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fpq_lightning.diffusion.media import IMAGE, LATENT, SOUND, medium_of
from fpq_lightning.evaluation.report.html import render_html
from fpq_lightning.evaluation.report.markdown import render_markdown
from fpq_lightning.evaluation.report.pictures import draw_samples
from fpq_lightning.utils.digests import with_digest
from fpq_lightning.utils.files import atomic_write, write_json
from fpq_lightning.utils.places import check_ours, check_writable
from fpq_lightning.utils.side_work import side_work
from fpq_lightning.utils.temporary import remove_leftovers

SCHEMA_VERSION = 2  # of report.json

_FILES = ("samples.png", "report.md", "report.html", "report.json")


def check_reports(directory: Path) -> None:
    """Finds out that reports in a directory would replace files that are none of ours.

    Raises:
        ValueError: if so, or if nothing can be written there.
    """
    check_ours(directory, _is_reported, _FILES, "--output")
    check_writable(directory, "--output")
    remove_leftovers(directory)


def _is_reported(directory: Path) -> bool:
    try:
        return "schema_version" in json.loads((directory / _FILES[-1]).read_text())
    except (OSError, ValueError, TypeError):
        return False


def write_reports(
    directory: Path, report: Mapping[str, Any], samples: Mapping[str, Tensor], sampling_rate: int | None = None
) -> None:
    """Writes `samples.png`, `report.md`, `report.html` and, last, `report.json`.

    Args:
        directory: where the files go.
        report: contents of `report.json`, without its version and what the samples are.
        samples: images, videos, sounds or latents, as `sample` gives them, by variant.
        sampling_rate: of sounds.
    """
    medium = medium_of(next(iter(samples.values()))) if samples else IMAGE
    kind = {"medium": medium.name, **({"sampling_rate": sampling_rate} if medium is SOUND else {})}
    report = {**kind, **report}
    if samples and medium is not LATENT:
        with atomic_write(directory / "samples.png") as temporary:
            temporary.write_bytes(draw_samples(samples, sampling_rate))
    pages = {"report.md": lambda: render_markdown(report), "report.html": lambda: render_html(report, samples)}
    for name, render in pages.items():
        text = None
        with side_work(name):
            text = render()
        if text is not None:
            with atomic_write(directory / name) as temporary:
                temporary.write_text(text)
    write_json(directory / "report.json", with_digest({"schema_version": SCHEMA_VERSION, **report}))
