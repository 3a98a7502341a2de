"""Linear and Conv layers whose input channels are cut into parts with quantizers of their own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fpq_lightning.nn.operands import Convolution, operate, quantize_input
from fpq_lightning.nn.swap import SwappedModule
from fpq_lightning.quantization.quantizer import Quantizer


class _PlainLayer(nn.Module):
    """Attributes of a plain Linear or Conv layer."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]


class SplitLayer(SwappedModule, _PlainLayer):
    """Mixin of Linear and Conv layers whose input channels are cut into parts with quantizers of their own.

    A layer that reads a concatenation has a part for each piece, since their ranges differ (Q-Diffusion, Li et al.
    2023, section 3.3).

    Attributes:
        splits: input channels of each part.
    """

    splits: tuple[int, ...]

    @property
    def convolution(self) -> Convolution | None:
        """How the filter moves; None for a Linear layer."""
        if isinstance(self, nn.Linear):
            return None
        edges = self._reversed_padding_repeated_twice
        return Convolution(self.stride, self.padding, self.dilation, self.groups, self.padding_mode, edges)

    @property
    def channel_dim(self) -> int:
        """The dimension of the input that holds its channels."""
        return -1 if isinstance(self, nn.Linear) else -1 - len(self.stride)

    def batched(self, x: Tensor) -> Tensor:
        """An input with the leading dimension that a call may leave out."""
        return x[None] if x.ndim == (1 if isinstance(self, nn.Linear) else self.weight.ndim - 1) else x

    @property
    def token_dims(self) -> tuple[int, ...]:
        """Dimensions of the input that share one scale when it is dynamic: a token, or an image of a convolution."""
        return (-1,) if isinstance(self, nn.Linear) else tuple(range(1, 2 + len(self.stride)))

    def quantize_input(self, x: Tensor, quantizers: Sequence[Quantizer]) -> Tensor:
        """Quantizes each part of the input; leaves it as it is without quantizers."""
        return quantize_input(x, quantizers, self.splits, self.channel_dim)

    def operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's linear operation with another weight."""
        return operate(x, weight, bias, self.convolution)
