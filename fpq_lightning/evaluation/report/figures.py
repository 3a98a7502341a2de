"""Figures of a report, as SVG text."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_WIDTH = 9.0  # inches
_ORANGE, _BLUE = "#c2702e", "#2563a8"


def _draw(height: float, paint: Callable[[Axes], None]) -> str:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axis = figure.subplots()
    paint(axis)
    axis.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    # Text stays text, and the file is reproducible.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fpq", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    return text.getvalue()[text.getvalue().index("<svg") :]


def unit_errors(blocks: Sequence[dict[str, Any]]) -> str:
    """Error of every unit, rounded to nearest and quantized."""
    shown = [b for b in blocks if b["error_nearest"] is not None]

    def paint(axis: Axes) -> None:
        x = range(len(shown))
        axis.vlines(x, [b["error_quantized"] for b in shown], [b["error_nearest"] for b in shown], color="#bbb", lw=1)
        axis.scatter(x, [b["error_nearest"] for b in shown], color=_ORANGE, s=22, label="nearest rounding")
        axis.scatter(x, [b["error_quantized"] for b in shown], color=_BLUE, s=22, label="quantized")
        axis.set_yscale("log")
        axis.set_ylabel("relative error of the unit's output")
        axis.set_xlabel("unit, in execution order")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False)

    return _draw(3.2, paint)


def formats_by_depth(blocks: Sequence[dict[str, Any]]) -> str:
    """The formats chosen for weights and inputs of each unit's layers."""
    kinds = (("weight_formats", _BLUE, "s", "weights"), ("activation_formats", _ORANGE, "o", "activations"))
    points = {
        kind: [(i, name) for i, b in enumerate(blocks) for names in b[kind].values() for name in names]
        for kind, *_ in kinds
    }
    names = [name for kind, *_ in reversed(kinds) for name in sorted({name for _, name in points[kind]})]

    def paint(axis: Axes) -> None:
        for kind, color, marker, label in kinds:
            counts = {point: points[kind].count(point) for point in points[kind]}
            axis.scatter(
                [i for i, _ in counts],
                [names.index(name) for _, name in counts],
                s=[22 * count for count in counts.values()],
                color=color,
                marker=marker,
                alpha=0.7,
                linewidths=0,
                label=f"{label} (area: how many)",
            )
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(-0.7, len(names) - 0.3)
        axis.set_xlabel("unit, in execution order")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), markerscale=0.7)

    return _draw(1.2 + 0.28 * len(names), paint)


def zeros_by_layer(layers: Sequence[dict[str, Any]]) -> str:
    """Share of weights that are exactly zero in each layer."""

    def paint(axis: Axes) -> None:
        axis.bar(range(len(layers)), [100 * layer["zeros"] for layer in layers], color=_BLUE, width=0.8)
        axis.set_ylabel("zero weights, %")
        axis.set_xlabel("layer")

    return _draw(2.4, paint)


def ranges_over_timesteps(ranges: dict[str, Any]) -> str:
    """Largest input of every layer along the trajectory, as the log2 of its ratio to the quantizer's clip."""
    layers = [layer for layer in ranges["layers"] if layer["clip"]]
    edges = ranges["timesteps"]

    def octaves(largest: float | None, clip: float) -> float:
        return math.nan if largest is None else math.log2(max(largest, clip / 64) / clip)

    values = np.array([[octaves(v, layer["clip"]) for v in layer["largest"]] for layer in layers])

    def paint(axis: Axes) -> None:
        limit = 4.0
        mesh = axis.pcolormesh(
            edges, np.arange(len(layers) + 1), values, cmap="RdBu_r", vmin=-limit, vmax=limit, rasterized=False
        )
        axis.invert_yaxis()
        axis.invert_xaxis()  # sampling goes from noise to image
        axis.set_xlabel("timestep (noise on the left, image on the right)")
        axis.set_ylabel("layer, in order")
        axis.figure.colorbar(mesh, ax=axis, label="log2(largest input / clip)", extend="both")

    return _draw(4.2, paint)
