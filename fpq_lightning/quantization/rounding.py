"""Learned rounding on a floating-point (or integer) grid.

AdaRound (Nagel et al. 2020, arXiv 2004.10568) carried over to formats whose step differs from element to
element (FP4DiT, arXiv 2503.15465): each weight lies between two grid values, and a variable decides which.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fpq_lightning.kernels import ops, reference
from fpq_lightning.quantization.quantizer import Quantizer


class LearnedRounding(nn.Module):
    """The rounding variables V of one quantized weight: ``W~ = offset + scale * sign * (base + h(V)) * step``.

    `base` is the magnitude rounded down to the grid, in steps of its binade; one step more is again on the grid, be
    it the next binade's first value. ``h(V) = clamp((zeta - gamma) * sigmoid(V) + gamma, 0, 1)`` starts at the
    fraction that the magnitude lies above `base`, so learning starts from the full-precision weight.

    Args:
        quantizer: format and scale of the rows; the scale is part of the result and may be learned.
        rows: the full-precision weight, `[n_rows, row_length]`.
        scale_aware: let h see ``V / step``, V starting at step times its plain value, so that the gradient of V
            does not depend on the step (FP4DiT). Steps are relative to the largest of the row.
    """

    base: Tensor
    step: Tensor
    sensitivity: Tensor | None

    def __init__(self, quantizer: Quantizer, rows: Tensor, scale_aware: bool = False) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.hardness: Tensor | float = 0.0
        fmt = quantizer.format
        y = quantizer.normalise(rows.detach())[0].detach().clamp(fmt.min, fmt.max).contiguous()
        step = fmt.step(y)
        magnitude = y.abs() / step
        # At h = 0 and h = 1 the gradient of the clamp is one-sided.
        h = (magnitude - magnitude.floor()).clamp_(0.01, 0.99)
        self.register_buffer("base", magnitude.floor())
        self.register_buffer("step", torch.copysign(step, y))
        self.register_buffer("sensitivity", step / step.amax(dim=1, keepdim=True) if scale_aware else None)
        v = torch.logit((h - reference.GAMMA) / (reference.ZETA - reference.GAMMA))
        self.v = nn.Parameter(v if self.sensitivity is None else v * self.sensitivity)

    def h(self) -> Tensor:
        """How far away from zero each weight is rounded, in [0, 1], the shape of the rows."""
        return reference.rectified_sigmoid(self.v, self.sensitivity)

    def forward(self) -> Tensor:
        """The rows with soft rounding (`hardness` 0) or with the hard decision (1); the gradient is that of h.

        With the hard decision in the forward pass the loss sees the weights that will be kept, so that no gap is
        left between what was learned and its rounding, however few the iterations.
        """
        q = self.quantizer
        return ops.rounded_weight(
            self.v, q.current_scale(), self.base, self.step, q.offset, self.hardness, q.format.min, q.format.max,
            self.sensitivity,
        )  # fmt: skip

    def regulariser(self, beta: Tensor) -> Tensor:
        """Mean of ``1 - |2h - 1|^beta`` over these variables (AdaRound, equation 24)."""
        return ops.rounding_regulariser(self.v, beta, self.sensitivity)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The hard decision ``V >= 0`` as codes (uint8) of the quantizer's format."""
        fmt = self.quantizer.format
        return fmt.encode(((self.base + (self.v >= 0).float()) * self.step).clamp(fmt.min, fmt.max))


def beta_schedule(progress: float, warmup: float, start: float = 20.0, end: float = 2.0) -> float | None:
    """The exponent of the regulariser, falling along a cosine from `start` to `end`.

    Args:
        progress: share of the iterations done, in [0, 1].
        warmup: share during which there is no regulariser.
        start: beta at the end of the warm-up.
        end: beta at the end.

    Returns:
        beta, or None during the warm-up.
    """
    if progress < warmup:
        return None
    rest = (progress - warmup) / max(1.0 - warmup, 1e-9)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * rest))
