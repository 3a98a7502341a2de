"""A tensor that is made of others, kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Memo:
    """Keeps what a function made of tensors until one of them is another tensor or was written to.

    The scales of FP8 products are made so: anew in every call they take 4 of the 68 us of a small layer on a CPU, and
    two more kernels on a GPU. Copies and pickles begin empty, since torch counts the writes of a copy anew.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[Tensor, ...], list[int], Tensor] | None = None

    def get(self, make: Callable[[], Tensor], *sources: Tensor) -> Tensor:
        """The tensor, from `make` if it is not kept. Sources of inference mode count no writes: nothing is kept."""
        if any(source.is_inference() for source in sources):
            return make()
        versions = [source._version for source in sources]
        kept = self._kept
        if kept is None or kept[1] != versions or any(a is not b for a, b in zip(kept[0], sources, strict=True)):
            kept = self._kept = (sources, versions, make())
        return kept[2]

    def __reduce__(self) -> Any:
        return Memo, ()
