"""Values that are the same but for rounding errors."""

from __future__ import annotations

from torch import Tensor


def is_close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two tensors of one shape differ by no more than a share of the second's norm; NaN is never a difference.

    Args:
        a: of a floating-point type wide enough for the sum of squares.
        b: the same.
        tolerance: the share.
    """
    return not bool((a - b).norm() > tolerance * b.norm())
