"""Pictures of samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

_SIZE = 1.1  # inches an image


def save_samples(samples: Mapping[str, Tensor], file: Path) -> None:
    """Draws a row of images for each variant, the same seeds in each column.

    Args:
        samples: images `[n, 3, height, width]` in [-1, 1] by variant.
        file: a PNG.
    """
    columns = max(len(images) for images in samples.values())
    figure = Figure(figsize=(_SIZE * (columns + 1), _SIZE * len(samples)), dpi=150)
    axes = figure.subplots(len(samples), columns, squeeze=False)
    for row, (variant, images) in zip(axes, samples.items(), strict=True):
        for axis, image in zip(row, images, strict=False):
            axis.imshow(image.nan_to_num().clamp(-1, 1).add(1).div(2).permute(1, 2, 0).numpy(), interpolation="nearest")
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(variant.replace("_", "\n"), rotation=0, ha="right", va="center", labelpad=8)
    figure.subplots_adjust(left=1 / (columns + 1), right=0.995, top=0.995, bottom=0.005, wspace=0.03, hspace=0.03)
    figure.savefig(file, format="png")
