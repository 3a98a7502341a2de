"""Pictures of samples."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from fpq_lightning.diffusion.media import IMAGE, SOUND, VIDEO, medium_of
from fpq_lightning.evaluation.metrics.log_mel import log_mel

_SIZE = 1.1  # inches an image
_IN_A_ROW = 8  # images, frames or sounds of each variant
_VIDEOS = 2  # of each variant
_DECIBELS = 80  # of a spectrogram below the loudest


def _row(images: Tensor) -> list[np.ndarray]:
    return list(images[:_IN_A_ROW].nan_to_num().clamp(-1, 1).add(1).div(2).permute(0, 2, 3, 1).numpy())


def _frames(video: Tensor) -> Tensor:
    """As many frames as fit into a row, from the first to the last."""
    return video[torch.linspace(0, len(video) - 1, min(len(video), _IN_A_ROW)).round().long()]


def _spectrograms(samples: Mapping[str, Tensor], sampling_rate: int) -> list[tuple[str, list[np.ndarray]]]:
    """Colours of the same meaning in all; low frequencies are below."""
    mono = {name: sounds[:_IN_A_ROW].nan_to_num().mean(1) for name, sounds in samples.items()}
    levels = {name: log_mel(sounds, sampling_rate).flip(-2).numpy() for name, sounds in mono.items()}
    loudest = max(level.max() for level in levels.values())
    colors = colormaps["magma"]
    return [(name, [colors(1 + (x - loudest) / _DECIBELS)[..., :3] for x in level]) for name, level in levels.items()]


def _rows(samples: Mapping[str, Tensor], sampling_rate: int | None) -> list[tuple[str, list[np.ndarray]]]:
    """The rows of the picture: a name and tiles in [0, 1], `[height, width, channels]`."""
    medium = medium_of(next(iter(samples.values())))
    if medium is IMAGE:
        return [(name, _row(images)) for name, images in samples.items()]
    if medium is VIDEO:
        n = min(_VIDEOS, min(map(len, samples.values())))
        return [(name, _row(_frames(videos[i]))) for i in range(n) for name, videos in samples.items()]
    assert sampling_rate is not None
    return _spectrograms(samples, sampling_rate)


def draw_samples(samples: Mapping[str, Tensor], sampling_rate: int | None = None) -> bytes:
    """A PNG with a row for each variant, the same seeds in each column; of videos the columns are frames.

    Args:
        samples: images, videos or sounds, as `sample` gives them, by variant.
        sampling_rate: of sounds, which are shown as log-mel spectrograms.
    """
    rows = _rows(samples, sampling_rate)
    columns = max(len(tiles) for _, tiles in rows)
    square = medium_of(next(iter(samples.values()))) is SOUND
    height = _SIZE * (1 if square else rows[0][1][0].shape[0] / rows[0][1][0].shape[1])
    figure = Figure(figsize=(_SIZE * (columns + 1), height * len(rows)), dpi=150)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (name, tiles) in zip(grid, rows, strict=True):
        for axis, tile in zip(axes, tiles, strict=False):
            axis.imshow(tile, interpolation="nearest", aspect="auto", cmap="gray", vmin=0, vmax=1)
        for axis in axes:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        axes[0].set_ylabel(name.replace("_", "\n"), rotation=0, ha="right", va="center", labelpad=8)
    figure.subplots_adjust(left=1 / (columns + 1), right=0.995, top=0.995, bottom=0.005, wspace=0.03, hspace=0.03)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
