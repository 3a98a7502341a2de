"""Where the images of a batch lie in the arguments of the denoiser.

It is found, not guessed: a pipeline is called for some images and for one more, and the arguments of the denoiser's
first calls are compared. What grows with the images belongs to them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten


@dataclass(frozen=True)
class Axis:
    """Where the images lie in an argument.

    Attributes:
        kind: ``dim``: along a dimension of a tensor; ``list`` or ``tuple``: an item of one each; ``shared``: all images
            of a call have one value, which changes from call to call.
        dim: that dimension.
        folded: rows of an image that lie next to each other, such as its frames.
    """

    kind: Literal["dim", "list", "tuple", "shared"] = "dim"
    dim: int = 0
    folded: int = 1

    def holds_items(self) -> bool:
        """Whether images are items of a list or tuple."""
        return self.kind in ("list", "tuple")


LEADING = Axis()
SHARED = Axis("shared")


@dataclass(frozen=True)
class _Found:
    axis: Axis
    candidates: frozenset[int]  # what `folded` may be
    size: int  # rows, or items, of each image

    def passes(self) -> int | None:
        """Guidance passes, where the values leave no doubt."""
        return self.size // next(iter(self.candidates)) if len(self.candidates) == 1 else None

    def settled(self, passes: int | None) -> Axis:
        folded = self.size // passes if passes and not self.size % passes else min(self.candidates)
        return replace(self.axis, folded=folded if folded in self.candidates else min(self.candidates))


def find_axes(network: str, small: Any, large: Any, images: int) -> dict[str, Axis]:
    """The axes of all arguments that grow with the images, by path.

    Rows of guidance passes lie outside of the images, rows that an image has several of (its frames) inside. Which is
    which is told by the rows themselves: the first images are the same in both calls.

    Args:
        network: its name, for errors.
        small: arguments of a call for some images.
        large: of one for the same and one more.
        images: in the first call.

    Raises:
        ValueError: if it cannot be told for an argument.
    """
    found = dict(_compare("", small, large, images))
    undecided = next((path for path, entry in found.items() if entry is None), None)
    if undecided is not None:
        raise ValueError(
            f"{network} is called with {undecided}, and how it belongs to the images of a batch cannot be told: "
            f"{images} and {images + 1} images give values that no axis explains; such pipelines cannot be calibrated"
        )
    known = {path: entry for path, entry in found.items() if entry is not None}
    passes = next((p for entry in known.values() if (p := entry.passes()) is not None), None)
    return {path: entry.settled(passes) for path, entry in known.items()}


def _compare(path: str, a: Any, b: Any, images: int) -> Iterator[tuple[str, _Found | None]]:
    """What grows from `a` to `b`; None for what changes otherwise."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape:
            yield path, _along_dimension(a, b, images)
    elif isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
        for key in a:
            yield from _compare(f"{path}/{key}" if path else str(key), a[key], b[key], images)
    elif isinstance(a, (list, tuple)) and type(a) is type(b):
        if len(a) == len(b):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                yield from _compare(f"{path}/{i}", x, y, images)
        else:
            yield path, _along_rows(a, b, images, Axis("tuple" if isinstance(a, tuple) else "list"))
    elif isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
        yield path, None


def _along_dimension(a: Tensor, b: Tensor, images: int) -> _Found | None:
    if a.ndim != b.ndim:
        return None
    grown = [d for d in range(a.ndim) if a.shape[d] != b.shape[d]]
    if len(grown) != 1:
        return None
    some, others = a.movedim(grown[0], 0), b.movedim(grown[0], 0)
    return _along_rows(some, others, images, Axis("dim", grown[0]))


def _along_rows(a: Any, b: Any, images: int, axis: Axis) -> _Found | None:
    if not len(a) or len(a) * (images + 1) != len(b) * images:
        return None
    size = len(a) // images
    folds = [m for m in range(1, size + 1) if size % m == 0]
    fitting = [m for m in folds if _fits(a, b, images, m)]
    return _Found(axis, frozenset(fitting or folds), size)


def _fits(a: Any, b: Any, images: int, folded: int) -> bool:
    """Whether the first images have the same rows in both calls, if each has so many next to each other."""
    passes = len(a) // (images * folded)
    return all(
        are_same(a[(p * images + i) * folded + j], b[(p * (images + 1) + i) * folded + j])
        for p in range(passes)
        for i in range(images)
        for j in range(folded)
    )


def are_same(a: Any, b: Any) -> bool:
    """Whether two trees are equal, up to what other sizes of a batch change in floating-point values."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or not a.is_floating_point():
            return torch.equal(a, b)
        return torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-5)
    (some, spec), (others, other_spec) = tree_flatten(a), tree_flatten(b)
    if spec != other_spec:
        return False
    if len(some) == 1 and some[0] is a:
        return bool(a == b)
    return all(map(are_same, some, others))


def collapsed(arguments: Any, axes: Mapping[str, Axis]) -> tuple[Any, dict[str, Any]]:
    """A tree of arguments with paths for leaves, and the leaves; a list with an item for each image is one leaf."""
    leaves: dict[str, Any] = {}

    def walk(path: str, node: Any) -> Any:
        if not (path in axes and axes[path].holds_items()):
            if isinstance(node, Mapping):
                entries = ((key, walk(f"{path}/{key}" if path else str(key), child)) for key, child in node.items())
                return OrderedDict(entries) if isinstance(node, OrderedDict) else dict(entries)
            if isinstance(node, (list, tuple)):
                children = [walk(f"{path}/{i}", child) for i, child in enumerate(node)]
                return tuple(children) if isinstance(node, tuple) else children
        leaves[path] = node
        return path

    return walk("", arguments), leaves


def images_of(value: Any, axis: Axis, n: int) -> list[list[Any]]:
    """The values of each image of a batch of n, for each guidance pass: tensors without the axis, or items.

    Folded rows become a leading dimension, folded items a list. What is no tensor in this call, such as None, all
    images share.
    """
    size = axis.folded
    if axis.holds_items():
        items = list(value) if size == 1 else [list(value[i : i + size]) for i in range(0, len(value), size)]
        return [items[start : start + n] for start in range(0, len(items), n)]
    if not isinstance(value, Tensor):
        return [[value] * n]
    rows = value.movedim(axis.dim, 0).unflatten(0, (-1, n, size))
    return [[image[0] if size == 1 else image for image in one] for one in rows]


def joined(values: Any, axis: Axis) -> Any:
    """The inverse of `images_of` for one pass: the argument for a batch.

    Args:
        values: of each image; `[n, ...]` where they are tensors of one shape.
        axis: of the argument.
    """
    if axis.holds_items():
        items = values if axis.folded == 1 else [item for some in values for item in some]
        return tuple(items) if axis.kind == "tuple" else list(items)
    if axis.kind == "shared" or not isinstance(values, Tensor):
        return values[0]
    rows = values.flatten(0, 1) if axis.folded > 1 else values
    return rows.movedim(0, axis.dim)
