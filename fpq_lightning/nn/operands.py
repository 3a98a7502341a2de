"""The operands of a Linear or Conv layer without the layer: codes, scales, bias, and how a filter moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the usual name

from fpq_lightning.nn.packed_weight import PackedWeight
from fpq_lightning.quantization.quantizer import Quantizer

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Convolution(NamedTuple):
    """How a filter moves over its input; attributes as of `torch.nn.Conv2d`.

    Attributes:
        edges: padding for `torch.nn.functional.pad`, if the mode is not ``zeros``.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    edges: list[int]


class Operands(NamedTuple):
    """What the input of a packed layer is multiplied with.

    Attributes:
        weights: the packed parts of the weight.
        inputs: the quantizers of the parts of the input; empty if it stays in full precision.
        splits: input channels of each part.
        bias: `[out]` or None.
        convolution: how the filter moves; None for a Linear layer.
    """

    weights: tuple[PackedWeight, ...]
    inputs: tuple[Quantizer, ...]
    splits: tuple[int, ...]
    bias: Tensor | None
    convolution: Convolution | None

    @property
    def outputs(self) -> int:
        """Output channels."""
        return self.weights[0].shape[0]

    @property
    def channel_dim(self) -> int:
        """The dimension of the input that holds its channels."""
        return -1 if self.convolution is None else -1 - len(self.convolution.stride)

    def decode_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight from its codes `[out, in, ...]`, float32 rounded to a type."""
        parts = [part(dtype) for part in self.weights]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def quantize_input(self, x: Tensor) -> Tensor:
        """Quantizes and dequantizes each part of an input."""
        return quantize_input(x, self.inputs, self.splits, self.channel_dim)


def quantize_input(x: Tensor, quantizers: Sequence[Quantizer], splits: Sequence[int], dim: int) -> Tensor:
    """Quantizes and dequantizes each part of an input. Without quantizers the input stays as it is.

    Args:
        x: the input.
        quantizers: one for each part, or none.
        splits: channels of each part.
        dim: the dimension of the channels.
    """
    if not len(quantizers):
        return x
    if len(splits) == 1:
        (only,) = quantizers
        return only(x)  # type: ignore[no-any-return]
    return torch.cat([q(part) for q, part in zip(quantizers, x.split(splits, dim), strict=True)], dim)


def operate(x: Tensor, weight: Tensor, bias: Tensor | None, convolution: Convolution | None) -> Tensor:
    """The operation of a Linear or Conv layer, in the type of the input.

    Args:
        x: `[..., in]`, or `[batch, in, ...]` for a convolution, whose batch may be left out.
        weight: `[out, in, ...]`.
        bias: `[out]` or None.
        convolution: how the filter moves; None for a Linear layer.
    """
    dtype = x.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if convolution is None:
        return F.linear(x, weight, bias)
    stride, padding, dilation, groups, mode, edges = convolution
    if mode != "zeros":
        x, padding = F.pad(x, edges, mode=mode), (0,) * len(stride)
    return _CONVOLUTIONS[len(stride)](x, weight, bias, stride, padding, dilation, groups)
