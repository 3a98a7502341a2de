"""The registry of metrics: what each one needs, how it is made, and how its numbers are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torchmetrics import Metric

from fpq_lightning.utils.registry import Registry

Network = Literal["features", "inception"]
Reference = Literal["full_precision", "real"]


@dataclass(frozen=True)
class Column:
    """A number that a metric gives.

    Attributes:
        key: in `report.json`.
        title: in tables; None leaves the number out of them.
        digits: after the decimal point, in tables.
        scale: factor of the number, in tables.
        unit: of the scaled number, such as ``dB``.
        headline: whether the last lines of a run and the figures of a study show it.
        log: whether the axis of such a figure is logarithmic.
    """

    key: str
    title: str | None = None
    digits: int = 3
    scale: float = 1
    unit: str = ""
    headline: bool = False
    log: bool = False

    @property
    def heading(self) -> str:
        """The head of a table's column."""
        return f"{self.title} {self.unit}".rstrip()

    def cell(self, value: float | None) -> str:
        """The number in a table."""
        return "-" if value is None else f"{self.scale * value:z.{self.digits}f}"


@dataclass(frozen=True, kw_only=True)
class ImageMetric:
    """A metric of image quality.

    Attributes:
        name: in the registry.
        help: what it measures, in a line.
        columns: its numbers. `compute` of the torchmetrics metric returns one tensor, or a dict with a value for each
            column, in this order.
        inputs: arguments of the torchmetrics metric's `update`, in order: ``images``, which are all frames of videos;
            ``reference``, the full-precision images of the same seeds; ``prompts``; with a `network` its outputs
            ``pooled``, ``spatial`` and ``logits``; ``videos``, ``sounds`` or ``latents``, with ``reference_videos``
            and so on; and ``sampling_rate``, of sounds. A batch that lacks one of them is left out, and so a metric
            of sounds has no place in a table of images.
        make: makes the torchmetrics metric from the `EvaluationConfig` or, with a `network`, from that network. None
            if it is not configured.
        network: the feature network that it works on, by the option of `EvaluationConfig` that configures it.
        against: the second set, for metrics that compare two sets of images. Their `update` is called for both sets,
            with ``real=True`` for the second one.
        pinned: whether `report.json` has its keys even if it was not measured.
        note: what readers of a table must know, given the number of images.
        weights: files or directories of the weights that it needs, by name, for ``fpq doctor``; None for one that is
            not found.
    """

    name: str
    help: str
    columns: tuple[Column, ...]
    inputs: tuple[str, ...]
    make: Callable[[Any], Metric | None]
    network: Network | None = None
    against: Reference | None = None
    pinned: bool = False
    note: Callable[[int], str] | None = None
    weights: Callable[[], Mapping[str, Path | None]] | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether it needs full-precision images."""
        return self.against == "full_precision" or any(name.startswith("reference") for name in self.inputs)

    def to_real(self, *columns: Column) -> ImageMetric:
        """The same metric against real images, with columns of its own."""
        text = f"{self.help.removesuffix('.')}, against real images."

        return replace(self, name=f"{self.name}_real", help=text, columns=columns, against="real", note=None)


METRICS: Registry[ImageMetric] = Registry("metric")


def table_columns(measured: Iterable[str]) -> list[Column]:
    """Columns of a table, in the order of the registry.

    Args:
        measured: keys that have a value.
    """
    keys = set(measured)
    return [column for metric in METRICS for column in metric.columns if column.title and column.key in keys]


def find_weights() -> dict[str, Path | None]:
    """Files or directories of the weights of all metrics, by name; None for those that are not found."""
    return {name: place for m in METRICS if m.weights is not None for name, place in m.weights().items()}
