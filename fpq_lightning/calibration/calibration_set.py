"""A calibration set: what the denoiser is called with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from fpq_lightning.calibration.axes import LEADING, Axis, joined


@dataclass
class CalibrationSet:
    """The arguments of many calls of the denoiser, an image of a guidance pass each.

    Attributes:
        inputs: keyword arguments that differ from sample to sample, by path, such as ``added_cond_kwargs/time_ids``:
            `[n, ...]`, or a list of n values where tensors differ in shape or are none.
        weights: how much an error on each sample matters, float32 `[n]`, with mean 1.
        constants: the other keyword arguments, by path.
        axes: where the samples of a batch lie in an argument, if not along its leading dimension.
        structure: the keyword arguments with the path of each leaf in its place; None if they are not nested.
        group_of: which samples can be in one batch, those with one number, int64 `[n]`: their tensors have the same
            shapes, they share what all images of a call share, and their masks are equal, for a mask may decide how
            many tokens a network sees. None finds out.
    """

    inputs: dict[str, Any]
    weights: Tensor
    constants: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Axis] = field(default_factory=dict)
    structure: dict[str, Any] | None = None
    group_of: Tensor | None = None

    def __post_init__(self) -> None:
        if self.structure is None:
            self.structure = _nested([*self.inputs, *self.constants])
        if self.group_of is None:
            self.group_of = self._find_groups()

    def __len__(self) -> int:
        return len(self.weights)

    def axis(self, path: str) -> Axis:
        """Where the samples of a batch lie in an argument."""
        return self.axes.get(path, LEADING)

    def batch(self, rows: slice | Tensor, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the denoiser for some of the samples, all of one group."""
        leaves = {path: joined(_rows(value, rows), self.axis(path)) for path, value in self.inputs.items()}
        placed = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, {**leaves, **self.constants})
        return tree_map(lambda path: placed[path], self.structure)

    def select(self, rows: Tensor) -> CalibrationSet:
        """A set of some of the samples."""
        inputs = {path: _chosen(value, rows) for path, value in self.inputs.items()}
        groups = cast(Tensor, self.group_of)[rows]
        return CalibrationSet(inputs, self.weights[rows], self.constants, self.axes, self.structure, groups)

    def largest_group(self) -> Tensor:
        """The samples of the group with the most of them, int64."""
        groups = cast(Tensor, self.group_of)
        return (groups == groups.bincount().argmax()).nonzero().flatten()

    def extremes(self) -> list[int]:
        """Samples that differ most, for that may decide what runs.

        Those with the smallest and the largest of each number and of each size, and one with each text.
        """
        found: set[int] = set()
        for value in self.inputs.values():
            sizes = [_size(value[i]) for i in range(len(self))]
            chosen: set[float | str] = {size for size in sizes if isinstance(size, str)}
            if numbers := [size for size in sizes if not isinstance(size, str)]:
                chosen |= {min(numbers), max(numbers)}
            found |= {sizes.index(size) for size in chosen}
        return sorted(found)

    @cached_property
    def n_groups(self) -> int:
        """How many groups there are."""
        return len(cast(Tensor, self.group_of).unique())

    def chunks(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        """Samples in parts that can be in one batch each.

        Args:
            rows: indices of samples, int64, on any device; it is waited for only if there are several groups.
            size: the most in a part.
        """
        if self.n_groups == 1:
            yield from rows.split(size) if len(rows) else ()
            return
        groups = cast(Tensor, self.group_of)[rows.cpu()]
        for group in groups.unique().tolist():
            yield from rows[(groups == group).to(rows.device)].split(size)

    def _find_groups(self) -> Tensor:
        numbers: dict[Any, int] = {}
        varying = {path: value for path, value in self.inputs.items() if self._may_divide(path, value)}
        keys = (tuple(_signature(v[i], self.axis(path)) for path, v in varying.items()) for i in range(len(self)))
        return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int64)

    def _may_divide(self, path: str, value: Any) -> bool:
        return not isinstance(value, Tensor) or self.axis(path).kind == "shared" or _is_mask(value[0])


def non_finite(values: Mapping[str, Any]) -> str | None:
    """The path of a value that holds NaN or Inf, and does not mask attention; None if there is none."""
    for path, value in values.items():
        for leaf in tree_flatten(value)[0]:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                continue
            if not (leaf.float().isfinite().all() or _is_bias(leaf)):
                return path
    return None


def _is_bias(leaf: Tensor) -> bool:
    """Whether it masks attention: zero, or minus infinity."""
    return bool(((leaf == 0) | (leaf == -torch.inf)).all())


def _nested(paths: list[str]) -> dict[str, Any]:
    """Nested dictionaries with a path at each leaf; those whose keys are numbers are lists."""
    tree: dict[str, Any] = {}
    for path in paths:
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = path
    return {key: _lists(child) for key, child in tree.items()}


def _lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    children = {key: _lists(child) for key, child in node.items()}
    if children and all(key.isdecimal() for key in children):
        return [children[key] for key in sorted(children, key=int)]
    return children


def _chosen(value: Any, rows: Tensor) -> Any:
    return value[rows] if isinstance(value, Tensor) else [value[i] for i in rows.tolist()]


def _rows(value: Any, rows: slice | Tensor) -> Any:
    """Some rows of an input; those of tensors of one shape in one tensor."""
    if isinstance(value, Tensor):
        return value[rows]
    found = value[rows] if isinstance(rows, slice) else _chosen(value, rows)
    return torch.stack(found) if all(isinstance(x, Tensor) for x in found) else found


def _size(value: Any) -> float | str:
    """A number, the number of values, or a text itself."""
    if isinstance(value, (str, type(None))):
        return str(value)
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
        return value.numel()
    return float(value) if isinstance(value, (Tensor, bool, int, float)) else sum(map(_extent, tree_flatten(value)[0]))


def _extent(leaf: Any) -> int:
    return leaf.numel() if isinstance(leaf, Tensor) else 1


def _signature(value: Any, axis: Axis) -> Any:
    """What samples of one batch have in common."""
    leaves, spec = tree_flatten(value)
    return str(spec), tuple(_leaf_signature(leaf, axis) for leaf in leaves)


def _leaf_signature(leaf: Any, axis: Axis) -> Any:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    if axis.kind == "shared" or _is_mask(leaf):
        return leaf.shape, leaf.float().numpy().tobytes()
    return leaf.shape


def _is_mask(value: Tensor) -> bool:
    """Whether it may say which tokens there are: zeros and ones along one dimension."""
    return 1 < value.numel() == max(value.shape) and bool(((value == 0) | (value == 1)).all())
