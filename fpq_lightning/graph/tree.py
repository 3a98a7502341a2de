"""Leaves of the nested arguments and outputs of modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import MappingKey, SequenceKey, tree_flatten, tree_flatten_with_path


def output_leaves(output: Any) -> list[Tensor]:
    """The floating-point tensors of a unit's output."""
    return [x for x in tree_flatten(output)[0] if isinstance(x, Tensor) and x.is_floating_point()]


def cloned(leaf: Any) -> Any:
    """A leaf that a network may change."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths, such as ``added_cond_kwargs/time_ids`` or ``images/0``."""
    return [("/".join(map(_key, path)), leaf) for path, leaf in tree_flatten_with_path(tree)[0]]


def _key(entry: Any) -> str:
    if isinstance(entry, MappingKey):
        return str(entry.key)
    return str(entry.idx if isinstance(entry, SequenceKey) else entry.name)
