"""The table and the figures of a study, from the rows that exist."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from fpq_lightning.evaluation.metrics import Column, table_columns
from fpq_lightning.study.config import complete
from fpq_lightning.study.row import VARIANTS, read_row
from fpq_lightning.utils.files import atomic_write
from fpq_lightning.utils.places import check_ours, check_writable
from fpq_lightning.utils.temporary import remove_leftovers

_SETTINGS = (  # of a row: key, title, digits
    ("weights", "weights", None),
    ("activations", "activations", None),
    ("weight_bits", "bits a weight", 2),
    ("iterations", "iterations", None),
    ("samples", "samples", None),
    ("sparsity", "zero weights", 3),
)
_FLOAT, _INTEGER = "#2563a8", "#c2702e"


def check_table(output: Path) -> None:
    """Finds out that the table of a study would replace files that are none of ours.

    Raises:
        ValueError: if so, or if nothing can be written there.
    """
    replaced = ("table.md", "table.csv", "quality_*.png", "trajectory.png")
    check_ours(output, lambda directory: any((directory / "rows").glob("*.json")), replaced, "output")
    check_writable(output, "output")
    for place in (output, output / "rows"):
        remove_leftovers(place)


def read_rows(output: Path, order: Sequence[str] = ()) -> list[dict[str, Any]]:
    """All rows in a study's directory: first the rows in `order`, then others by name.

    Raises:
        ValueError: if a file cannot be read.
    """
    rows = [read_row(file) for file in sorted((output / "rows").glob("*.json"))]
    places = {name: i for i, name in enumerate(order)}
    rows.sort(key=lambda row: (places.get(row["name"], len(places)), row["name"], VARIANTS.index(row["variant"])))
    return rows


def spreads(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each recipe that was calibrated with several seeds: the range of every metric over the seeds."""
    repeats: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        settings = complete(row.get("settings", {}))
        if "seed" in settings.get("data", {}):
            same = {**settings, "data": {**settings["data"], "seed": None}}
            repeats.setdefault(json.dumps(same, sort_keys=True), []).append(row)
    found: list[dict[str, Any]] = []
    for members in (members for members in repeats.values() if len(members) > 1):
        measured = {k for row in members for k, v in row["metrics"].items() if v is not None and k != "n_images"}
        values = {k: [row["metrics"].get(k) for row in members] for k in measured}
        metrics = {k: max(v) - min(v) for k, v in values.items() if None not in v}
        shown: dict[str, Any] = {
            k: members[0][k] for k in ("weights", "activations", "iterations", "samples") if k in members[0]
        }
        name = f"{members[0]['name']}, {len(members)} seeds"
        found.append({"name": name, "variant": members[0]["variant"], **shown, "metrics": metrics})
    return found


def _setting(value: Any, digits: int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(value)
    return str(value) if digits is None else f"{value:z.{digits}f}"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of rows; columns without a value are left out."""
    settings = [entry for entry in _SETTINGS if any(row.get(entry[0]) is not None for row in rows)]
    metrics = table_columns(_measured(rows))
    titles = ["row", "variant", *(title for _, title, _ in settings), *(column.heading for column in metrics)]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        line = [row["name"], row["variant"].replace("_", " ")]
        line += [_setting(row.get(key), digits) for key, _, digits in settings]
        line += [column.cell(row["metrics"].get(column.key)) for column in metrics]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _measured(rows: Sequence[dict[str, Any]]) -> set[str]:
    return {key for row in rows for key, value in row["metrics"].items() if value is not None}


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table for each group of rows, one of the differences between seeds, and where they were computed."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tables.setdefault(row["group"], []).append(row)
    if found := spreads(rows):
        tables["largest difference between seeds"] = found
    parts = [part for group, members in tables.items() for part in (f"### {group}", _table(members))]
    places = dict.fromkeys(
        f"{row['hardware']}, torch {row['versions']['torch']}, {row['metrics']['n_images']} images, {row['date']}"
        for row in rows
    )
    parts.append("Computed on: " + "; ".join(places) + ".")
    return "\n\n".join(parts) + "\n"


def csv_table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows with unrounded numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    settings, metrics = [key for key, *_ in _SETTINGS], [column.key for column in table_columns(_measured(rows))]
    writer.writerow(["name", "variant", "group", *settings, *metrics, "n_images", "hardware", "date"])
    for row in rows:
        values = [row.get(key) for key in settings] + [row["metrics"].get(key) for key in metrics]
        written = [" ".join(value) if isinstance(value, list) else value for value in values]
        place = [row["metrics"]["n_images"], row["hardware"], row["date"]]
        writer.writerow([row["name"], row["variant"], row["group"], *written, *place])
    return text.getvalue()


def _is_integer(row: dict[str, Any]) -> bool:
    return "int" in str(row.get("weights"))


def quality_figure(rows: Sequence[dict[str, Any]], column: Column) -> Figure:
    """A metric of each recipe, in the order of bits a weight: nearest rounding and quantized, floats and integers."""
    metric = column.key
    shown = [row for row in rows if row["metrics"].get(metric) is not None and row.get("weight_bits") is not None]
    bits = {row["name"]: row["weight_bits"] for row in shown}
    places = {name: i for i, name in enumerate(sorted(bits, key=lambda name: -bits[name]))}
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(places)), layout="constrained")
    axis = figure.subplots()
    for row in shown:
        color = _INTEGER if _is_integer(row) else _FLOAT
        filled = row["variant"] == "quantized"
        axis.scatter(row["metrics"][metric], places[row["name"]], c=color if filled else "none", edgecolors=color, s=40)
    for color, name in ((_FLOAT, "floating point"), (_INTEGER, "integer")):
        axis.scatter([], [], color=color, label=f"{name}, quantized")
        axis.scatter([], [], color="none", edgecolors=color, label=f"{name}, nearest rounding")
    noise = next((row["metrics"].get(metric) for row in rows if row["variant"] == "other_seeds"), None)
    if noise is not None:
        axis.axvline(noise, color="#888", lw=1, ls="--", label="full precision, other seeds")
    axis.set_xscale("log" if column.log else "linear")
    axis.set_yticks(list(places.values()), [f"{name} ({bits[name]:.2f} bits)" for name in places], fontsize=8)
    axis.set_xlabel(column.heading)
    axis.grid(axis="y", color="#eee")
    axis.set_axisbelow(True)
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, fontsize=7, loc="outside upper center", ncols=3)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def trajectory_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Error along the trajectory: of the denoiser's output on full-precision states, and of the states reached."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    names = list(dict.fromkeys(row["name"] for row in rows))
    colors = {name: colormaps["tab20"](i % 20) for i, name in enumerate([*names[::2], *names[1::2]])}
    for row in rows:
        quantized = row["variant"] == "quantized"
        for axis, key in zip(axes, ("output", "state"), strict=True):
            # The first state is noise, the same for all.
            found = row["trajectory"]
            points = [(t, e) for t, e in zip(found["timesteps"], found[key], strict=True) if e > 0]
            label = row["name"] if quantized else None
            axis.plot(*zip(*points, strict=True), "-" if quantized else ":", c=colors[row["name"]], lw=1.3, label=label)
    for axis, title in zip(axes, ("error of the output on full-precision states", "error of the states"), strict=True):
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("timestep (sampling goes left to right)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_xaxis()
    axes[0].set_ylabel("relative mean square")
    axes[0].plot([], [], ":", c="#444", lw=1.3, label="nearest rounding of the same")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=7, loc="outside right upper")
    return figure


def write_table(output: Path, order: Sequence[str] = ()) -> list[Path]:
    """Writes `table.md`, `table.csv` and the figures of all existing rows; returns the files."""
    rows = read_rows(output, order)
    if not rows:
        return []
    texts = {"table.md": markdown_table(rows), "table.csv": csv_table(rows)}
    for name, text in texts.items():
        with atomic_write(output / name) as temporary:
            temporary.write_text(text)
    first = [row for row in rows if row["group"] == rows[0]["group"] or row["variant"] == "other_seeds"]
    headlines = [column for column in table_columns(_measured(first)) if column.headline]
    figures = {f"quality_{column.key}.png": quality_figure(first, column) for column in headlines}
    if traced := [row for row in first if "trajectory" in row]:
        figures["trajectory.png"] = trajectory_figure(traced)
    for name, figure in figures.items():
        with atomic_write(output / name) as temporary:
            figure.savefig(temporary, format="png", dpi=130)
    return [output / name for name in (*texts, *figures)]
