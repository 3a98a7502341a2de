"""Leaves of the nested arguments and outputs of modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten


def output_leaves(output: Any) -> list[Tensor]:
    """The floating-point tensors of a unit's output."""
    return [x for x in tree_flatten(output)[0] if isinstance(x, Tensor) and x.is_floating_point()]


def flatten(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of a nested argument, by path."""
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield name, value
        return
    for key, child in items:
        yield from flatten(f"{name}/{key}", child)


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`; lists and tuples become lists."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return {key: _lists(child) for key, child in tree.items()}


def _lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    children = {key: _lists(child) for key, child in node.items()}
    if children and all(key.isdecimal() for key in children):
        return [children[key] for key in sorted(children, key=int)]
    return children
