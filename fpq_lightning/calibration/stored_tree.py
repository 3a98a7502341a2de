"""Arguments or outputs of a unit whose batched tensors lie in the activation store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fpq_lightning.calibration.store import ActivationStore


class StoredTree:
    """A structure of tensors whose batched leaves lie in the store, samples first.

    Which leaves are batched, and along which dimension, is told by two passes with batches of different size. That
    dimension may hold others folded into it (frames, windows), sample by sample. Leaves that are the network's own
    inputs, such as embeddings of the prompt, lie in the store once for all units.
    """

    def __init__(
        self, name: str, unit: str, small: Any, large: Any, given: Mapping[int, str] | None = None, group: int = 0
    ) -> None:
        self.name, self.group = name, group
        leaves, self.spec = tree_flatten(small)
        other = tree_flatten(large)[0]
        self.dims = [batch_dim(unit, a, b) for a, b in zip(leaves, other, strict=True)]
        self.batched = [dim is not None for dim in self.dims]
        # Of batched leaves shape and type are all that is needed.
        self.constants: list[Any] = [
            leaf if dim is None else leaf.new_zeros(()).expand(leaf.shape).movedim(dim, 0)
            for leaf, dim in zip(leaves, self.dims, strict=True)
        ]
        self.given = [(given or {}).get(id(leaf)) for leaf in leaves]  # paths of the network's inputs

    def conditions(self) -> list[str]:
        """Paths of the network's inputs among the leaves."""
        return [path for path, batched in zip(self.given, self.batched, strict=True) if batched and path is not None]

    def stored(self) -> list[str]:
        """Keys of what is stored for this tree alone."""
        own = [batched and path is None for path, batched in zip(self.given, self.batched, strict=True)]
        return [self._key(i) for i, mine in enumerate(own) if mine]

    def _key(self, leaf: int) -> str:
        return f"{self.name}.{leaf}@{self.group}"

    def all_keys(self) -> list[str]:
        """Keys of all batched leaves."""
        leaves = enumerate(zip(self.given, self.batched, strict=True))
        return [
            self._key(i) if path is None else condition_key(path, self.group)
            for i, (path, batched) in leaves
            if batched
        ]

    def allocate(self, store: ActivationStore, n: int, next_use: int) -> None:
        for key, leaf, folded in self._own(self.constants):
            store.allocate(key, (n, folded, *leaf.shape[1:]), leaf.dtype, next_use)

    def _own(self, leaves: list[Any]) -> Iterator[tuple[str, Tensor, int]]:
        """Key, value with samples first and fold of what is stored for this tree alone."""
        own = set(self.stored())
        found = zip(self.all_keys(), self._batched_of(leaves), self._folds(), strict=True)
        return (entry for entry in found if entry[0] in own)

    def _batched_of(self, leaves: list[Any]) -> list[Tensor]:
        return [leaf for leaf, batched in zip(leaves, self.batched, strict=True) if batched]

    def _folds(self) -> list[int]:
        """Rows that belong to one sample, for each batched leaf."""
        return [len(leaf) // 2 for leaf in self._batched_of(self.constants)]

    def write(self, store: ActivationStore, start: int, tree: Any) -> None:
        leaves = tree_flatten(tree)[0]
        moved = [leaf if dim is None else leaf.movedim(dim, 0) for leaf, dim in zip(leaves, self.dims, strict=True)]
        for key, leaf, folded in self._own(moved):
            store.write(key, start, leaf.unflatten(0, (-1, folded)))

    def fill(self, batched: list[Tensor]) -> Any:
        values = iter(batched)
        leaves = [
            constant if dim is None else next(values).movedim(0, dim)
            for dim, constant in zip(self.dims, self.constants, strict=True)
        ]
        return tree_unflatten(leaves, self.spec)

    def by_sample(self, tree: Any, n: int) -> list[Tensor]:
        """The floating-point leaves of a value, samples first: the batched ones, or else what all n samples share."""
        leaves = [
            (x, dim)
            for x, dim in zip(tree_flatten(tree)[0], self.dims, strict=True)
            if isinstance(x, Tensor) and x.is_floating_point()
        ]
        batched = [x.movedim(dim, 0) for x, dim in leaves if dim is not None]
        return batched or [x.expand(n, *x.shape) for x, _ in leaves]

    def read(self, store: ActivationStore, rows: slice | Tensor) -> Any:
        return self.fill([store.read(key, rows).flatten(0, 1) for key in self.all_keys()])

    def placeholder(self, n: int, in_memory: bool) -> Any:
        """Zeros of the right shape, that take no memory unless the network changes them in place."""
        zeros = [
            leaf.new_zeros(()).expand(n * folded, *leaf.shape[1:])
            for leaf, folded in zip(self._batched_of(self.constants), self._folds(), strict=True)
        ]
        return self.fill([z.clone() for z in zeros] if in_memory else zeros)


def condition_key(path: str, group: int) -> str:
    """The key of an input of the network, which all units that read it share."""
    return f"condition.{path}@{group}"


def batch_dim(unit: str, small: Any, large: Any) -> int | None:
    """The dimension of a leaf that grows with the batch, given its values for batches of two and three; None if none.

    Raises:
        ValueError: if the leaf changes with the batch in another way.
    """
    if isinstance(small, Tensor) and isinstance(large, Tensor):
        if small.shape == large.shape:
            a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (small, large))
            if torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True):
                return None
            change = f"whose values, of shape {tuple(small.shape)}, depend on who else is in the batch"
        else:
            grown = [d for d in range(small.ndim) if small.ndim == large.ndim and small.shape[d] != large.shape[d]]
            if len(grown) == 1 and small.shape[grown[0]] * 3 == large.shape[grown[0]] * 2:
                return grown[0]
            change = (
                f"whose shape {tuple(small.shape)} for two samples and {tuple(large.shape)} for three does not grow "
                "with them"
            )
    elif isinstance(small, Tensor) or isinstance(large, Tensor) or type(small) is not type(large):
        change = "that is one for some batches only"
    else:
        return None
    raise ValueError(f"{unit} takes or gives a tensor {change}: it cannot be captured; exclude the layers of this unit")
