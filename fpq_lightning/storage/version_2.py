"""Packed files of version 2, in which the tensors of attention have other names."""

from __future__ import annotations

import re

_ATTENTION = re.compile(r"\.variants\.learned\.inputs\.(\d+\.(scale|offset))$")


def current_name(tensor: str) -> str:
    """The name that a tensor of version 2 has today."""
    return _ATTENTION.sub(r".operands.\1", tensor)
