"""Placing a format on a tensor: scale, offset and granularity.

``Q(x) = offset + scale * value(code)`` with ``code`` the nearest one to ``(x - offset) / scale``.
A searched real-valued exponent bias is nothing but a scale (Kuzmin et al. 2022): with clip ``c`` and
format maximum ``m`` the scale is ``c / m``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fpq_lightning.formats.numbers import Format, parse_format
from fpq_lightning.formats.scales import FLOAT32, ScaleFormat, parse_scale_format
from fpq_lightning.kernels import ops


@dataclass(frozen=True)
class Granularity:
    """How many scales a weight gets: a weight is viewed as rows, and each row has one.

    Attributes:
        kind: one row for the whole tensor, one for each output channel, or one for each group of
            `group_size` consecutive weights of an output channel (input channel, then kernel position).
        group_size: length of a group; only with ``kind="group"``.
        scale_format: what the scale of a group may be: any ``float32`` number, or one of `SCALE_FORMATS`.
    """

    kind: Literal["tensor", "channel", "group"] = "channel"
    group_size: int | None = None
    scale_format: str = FLOAT32

    def __post_init__(self) -> None:
        if self.kind not in ("tensor", "channel", "group"):
            raise ValueError(f"unknown granularity {self.kind!r}: use tensor, channel or group")
        if (self.kind == "group") != (self.group_size is not None):
            raise ValueError(
                f"group_size goes with granularity group and only with it, got {self.kind} and {self.group_size}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        if parse_scale_format(self.scale_format) is not None and self.kind != "group":
            raise ValueError(
                f"scale_format {self.scale_format} goes with granularity group and a group_size, got {self.kind}"
            )

    def fitting(self, parts: Iterable[Tensor]) -> Granularity:
        """This granularity, or one scale a channel for a layer whose weight parts the group size does not divide."""
        size = self.group_size
        if size is None or all(part[0].numel() % size == 0 for part in parts):
            return self
        return Granularity("channel")

    def rows(self, weight: Tensor, name: str = "weight") -> Tensor:
        """Views a weight `[out, ...]` as rows `[n_rows, row_length]`.

        Raises:
            ValueError: if the group size does not divide the weights of an output channel.
        """
        flat = weight.reshape(1 if self.kind == "tensor" else weight.shape[0], -1)
        if self.group_size is None:
            return flat
        if flat.shape[1] % self.group_size:
            raise ValueError(
                f"{name}: group_size {self.group_size} does not divide its {flat.shape[1]} weights an output "
                "channel; choose a divisor or exclude the layer"
            )
        return flat.reshape(-1, self.group_size)


def layers_without_groups(granularity: Granularity, weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the layers whose weights the group size does not divide.

    Raises:
        ValueError: if it divides none.
    """
    found = [name for name, weight in weights.items() if granularity.fitting([weight]) != granularity]
    if found and len(found) == len(weights):
        granularity.rows(weights[found[0]], found[0])
    return found


def without_groups(granularity: Granularity, layers: Sequence[str]) -> str:
    """What to say of such layers."""
    shown = ", ".join(layers[:5]) + (f" and {len(layers) - 5} more" if len(layers) > 5 else "")
    return (
        f"group_size {granularity.group_size} does not divide the weights of an output channel of {shown}: one float32 "
        "scale for each output channel there"
    )


class ExactBuffers(nn.Module):
    """A module whose buffers keep their types when a network is cast: codes stay codes, and scales float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactBuffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class Quantizer(ExactBuffers):
    """A format with its scale and offset on a tensor.

    Args:
        fmt: the number format.
        scale: positive float32, broadcastable to the tensor; ``None`` takes it from each token at run time.
        offset: float32 like `scale`, the value of code zero; ``None`` means 0.
        token_dims: with a run-time scale, the dimensions that share one: their largest magnitude is the clip.
        scale_format: the numbers that the scales are among, None for all.
    """

    scale: Tensor | None
    offset: Tensor | None
    log_gain: nn.Parameter | None

    def __init__(
        self,
        fmt: Format,
        scale: Tensor | None,
        offset: Tensor | None = None,
        token_dims: tuple[int, ...] = (-1,),
        scale_format: ScaleFormat | None = None,
    ) -> None:
        super().__init__()
        self.format = fmt
        self.token_dims = token_dims
        self.scale_format = scale_format
        self.register_buffer("scale", None if scale is None else scale.detach().float())
        self.register_buffer("offset", None if offset is None else offset.detach().float())
        self.register_parameter("log_gain", None)

    @property
    def scale_bits(self) -> int:
        """What static scales and offsets take in files."""
        if self.scale is None:
            return 0
        if self.scale_format is not None:
            return 8 * self.scale.numel() + 32 * self.scale_format.relative
        return 32 * self.scale.numel() * (1 if self.offset is None else 2)

    @property
    def clip(self) -> Tensor:
        """The largest representable value (per row)."""
        if self.scale is None:
            raise ValueError("a dynamic quantizer has no clip of its own")
        top = self.scale * self.format.max
        return top if self.offset is None else top + self.offset

    def learn_scale(self) -> None:
        """Makes the logarithm of a factor on the scale a parameter, unless that would leave the scale's format."""
        if self.scale is not None and self.scale_format is None:
            self.log_gain = nn.Parameter(torch.zeros_like(self.scale))

    def freeze_scale(self) -> None:
        """Makes the learned factor part of the scale."""
        if self.log_gain is not None:
            self.scale = self.current_scale().detach()
            self.log_gain = None

    def current_scale(self) -> Tensor:
        """The static scale, with the factor that is being learned."""
        scale, gain = self.scale, self.log_gain
        if scale is None:
            raise ValueError("a dynamic quantizer has no scale of its own")
        return scale if gain is None else scale * gain.exp()

    def token_scale(self, x: Tensor) -> Tensor:
        """The scale of each token of a float32 tensor, so that its largest magnitude is that of the format."""
        return x.detach().abs().amax(dim=self.token_dims, keepdim=True).clamp_(min=1e-12) / self.format.max

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor at the unit scale of the format, and the scale."""
        x = x.float()
        scale = self.token_scale(x) if self.scale is None else self.current_scale()
        return (x if self.offset is None else x - self.offset) / scale, scale

    def place(self, value: Tensor, scale: Tensor) -> Tensor:
        return value * scale if self.offset is None else value * scale + self.offset

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes and dequantizes; straight-through gradient inside the range, zero outside.

        The gradient with respect to a learned scale is that of LSQ (Esser et al. 2020):
        ``value - x / scale`` inside the range and the bound outside.
        """
        scale = self.token_scale(x.float()) if self.scale is None else self.current_scale()
        return ops.fake_quantize(x, scale, self.offset, self.format)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (uint8, the shape of `x`) of the nearest values.

        Raises:
            ValueError: if `x` holds NaN.
        """
        return self.format.encode(self.normalise(x)[0])

    def decode(self, codes: Tensor) -> Tensor:
        """Values (float32) of `codes`; bit-equal to the quantized tensor they were encoded from."""
        if self.scale is None:
            raise ValueError("codes of a dynamic quantizer cannot be decoded without its scales")
        return self.place(self.format.decode(codes), self.scale)

    def to_state(self) -> dict[str, Any]:
        """Tensors and plain types that `from_state` reads."""
        return {
            "format": self.format.name,
            "scale": None if self.scale is None else self.current_scale().detach(),
            "offset": self.offset,
            "token_dims": list(self.token_dims),
            "scale_format": FLOAT32 if self.scale_format is None else self.scale_format.name,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Quantizer:
        """The inverse of `to_state`."""
        scale_format = parse_scale_format(state.get("scale_format", FLOAT32))
        dims = tuple(state["token_dims"])
        return cls(parse_format(state["format"]), state["scale"], state["offset"], dims, scale_format)

    def extra_repr(self) -> str:
        scales = "dynamic" if self.scale is None else f"{self.scale.numel()} scales"
        return f"{self.format}, {scales}{'' if self.offset is None else ', offset'}"
