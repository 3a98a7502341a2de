"""What the rows of a weight are multiplied with: the tokens of a Linear layer, the patches of a convolution."""

from __future__ import annotations

from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the usual name

from fpq_lightning.nn.split_layer import SplitLayer


def patches(layer: SplitLayer, x: Tensor, jitter: Tensor) -> Tensor:
    """The inputs of a layer's rows at some of the places of each element of a batch.

    Args:
        layer: Linear or Conv.
        x: its input; one without a batch is a batch of one.
        jitter: `[batch, most]` from 0 to 1. An element with more than `most` places gives one of each of as many equal
            ranges, at that share of the range.

    Returns:
        `[batch, places, groups, in / groups * kernel]`.
    """
    x = layer.batched(x)
    if isinstance(layer, nn.Linear):
        tokens = x.reshape(len(x), -1, 1, x.shape[-1])
        return _drawn(tokens, 1, jitter).flatten(3)
    kernel = layer.weight.shape[2:]
    # With each window along dimensions of its own nothing is copied before the places are drawn.
    windows = _padded(layer, x)
    for d, (size, stride, dilation) in enumerate(zip(kernel, layer.stride, layer.dilation, strict=True)):
        windows = windows.unfold(2 + d, dilation * (size - 1) + 1, stride)[..., ::dilation]
    dims = len(kernel)
    found = _drawn(windows.movedim(1, 1 + dims), dims, jitter)  # [batch, places, in, *kernel]
    return found.unflatten(2, (layer.groups, -1)).flatten(3)


def count_places(layer: SplitLayer, x: Tensor) -> int:
    """Places of each element of a batch: tokens, or outputs of a convolution."""
    x = layer.batched(x)
    if isinstance(layer, nn.Linear):
        return x[0].numel() // x.shape[-1]
    edges = layer._reversed_padding_repeated_twice  # last dimension first
    padded = [n + sum(edges[2 * d : 2 * d + 2]) for d, n in enumerate(reversed(x.shape[2:]))]
    moves = zip(reversed(padded), layer.weight.shape[2:], layer.stride, layer.dilation, strict=True)
    return prod((n - dilation * (size - 1) - 1) // stride + 1 for n, size, stride, dilation in moves)


def _padded(layer: SplitLayer, x: Tensor) -> Tensor:
    """The input of a convolution with its padding."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


def _drawn(values: Tensor, dims: int, jitter: Tensor) -> Tensor:
    """Some places of `[batch, *places, ...]`, whose places have `dims` dimensions, `[batch, drawn, ...]`."""
    shape = values.shape[1 : 1 + dims]
    n, at_most = shape.numel(), jitter.shape[1]
    if n <= at_most:
        return values.flatten(1, dims) if dims > 1 else values
    jitter = jitter.to(values.device)
    places = ((torch.arange(at_most, device=values.device) + jitter) * (n / at_most)).long().clamp(max=n - 1)
    batch = torch.arange(len(values), device=values.device)[:, None]
    return cast(Tensor, values[(batch, *torch.unravel_index(places, shape))])
