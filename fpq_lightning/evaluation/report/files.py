"""Writing the files of a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fpq_lightning.evaluation.report.html import render_html
from fpq_lightning.evaluation.report.markdown import render_markdown
from fpq_lightning.evaluation.report.pictures import save_samples
from fpq_lightning.utils.files import atomic_write, write_json
from fpq_lightning.utils.side_work import side_work

SCHEMA_VERSION = 2  # of report.json
_IN_A_ROW = 8  # images of each variant in samples.png


def write_reports(directory: Path, report: Mapping[str, Any], samples: Mapping[str, Tensor]) -> None:
    """Writes `samples.png`, `report.md`, `report.html` and, last, `report.json`.

    Args:
        directory: where the files go.
        report: contents of `report.json`, without its version.
        samples: images `[n, 3, height, width]` in [-1, 1] by variant.
    """
    if samples:
        with atomic_write(directory / "samples.png") as temporary:
            save_samples({name: images[:_IN_A_ROW] for name, images in samples.items()}, temporary)
    pages = {"report.md": lambda: render_markdown(report), "report.html": lambda: render_html(report, samples)}
    for name, render in pages.items():
        text = None
        with side_work(name):
            text = render()
        if text is not None:
            with atomic_write(directory / name) as temporary:
                temporary.write_text(text)
    write_json(directory / "report.json", {"schema_version": SCHEMA_VERSION, **report})
