"""Places at which what layers read is looked at: a few of each sample, the same ones whoever else is in a batch."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fpq_lightning.nn.calibrated import QuantizedLayer
from fpq_lightning.nn.patches import patches

PLACES = 64  # of each sample, at most


def at_places(layer: QuantizedLayer, x: Tensor, samples: Tensor) -> Tensor:
    """What the rows of a layer are multiplied with, at some places of each sample.

    Args:
        layer: Linear or Conv.
        x: its input, `[n, ...]`, or with several rows of each sample (frames, windows) one after the other.
        samples: numbers of the samples, int64 `[n]`; they decide which places are drawn.

    Returns:
        `[batch, places, groups, in / groups * kernel]` of `patches`.
    """
    n, jitter = len(layer.batched(x)), _jitter()
    folded, rest = divmod(n, len(samples))
    if rest:
        return patches(layer, x, jitter[torch.arange(n) % len(jitter)])
    of_sample = jitter[samples.cpu() % len(jitter)].repeat_interleave(folded, dim=0)
    turn = 0.618034 * (torch.arange(n) % folded)  # other places in each of its frames
    return patches(layer, x, (of_sample + turn[:, None]) % 1)


@cache
def _jitter() -> Tensor:
    """Where places lie in their ranges, for each sample."""
    return torch.rand(2**12, PLACES, generator=torch.Generator().manual_seed(0))
