"""Arguments or outputs of a unit whose batched tensors lie in the activation store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fpq_lightning.calibration.store import ActivationStore
from fpq_lightning.utils.closeness import is_close


class Place(NamedTuple):
    """Where the samples lie in a tensor.

    Attributes:
        dim: the dimension that grows with them.
        is_inner: whether what is folded into it (frames, windows) lies outside of the samples.
    """

    dim: int
    is_inner: bool = False

    def samples_first(self, leaf: Tensor, folded: int) -> Tensor:
        """`[n, folded, ...]` of a tensor that has `folded` rows of each sample."""
        rows = leaf.movedim(self.dim, 0)
        return rows.unflatten(0, (folded, -1)).transpose(0, 1) if self.is_inner else rows.unflatten(0, (-1, folded))

    def put_back(self, samples: Tensor) -> Tensor:
        """The inverse of `samples_first`."""
        rows = samples.transpose(0, 1) if self.is_inner else samples
        return rows.flatten(0, 1).movedim(0, self.dim)


class StoredTree:
    """A structure of tensors whose batched leaves lie in the store, samples first.

    Which leaves are batched, and along which dimension, is told by two passes with batches of different size. That
    dimension may hold others folded into it (frames, windows). Leaves that are the network's own inputs, such as
    embeddings of the prompt, lie in the store once for all units.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        small: Any,
        large: Any,
        given: Mapping[int, str] | None = None,
        group: int = 0,
        values: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.name, self.unit, self.group = name, unit, group
        leaves, self.spec = tree_flatten(small)
        other = tree_flatten(large)[0]
        if len(leaves) != len(other):
            raise ValueError(f"{unit} takes or gives {len(leaves)} values for two samples and {len(other)} for three")
        self.places = [find_place(unit, a, b, values) for a, b in zip(leaves, other, strict=True)]
        self.batched = [place is not None for place in self.places]
        # Of batched leaves shape and type are all that is needed.
        self.constants: list[Any] = [
            leaf if place is None else leaf.new_zeros(()).expand(leaf.shape).movedim(place.dim, 0)
            for leaf, place in zip(leaves, self.places, strict=True)
        ]
        self.given = [(given or {}).get(id(leaf)) for leaf in leaves]  # paths of the network's inputs

    def holds_targets(self) -> bool:
        """Whether there is a floating-point tensor."""
        return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in self.constants)

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
        own = set(self.stored())
        for key, (leaf, folded) in zip(self.all_keys(), self._batched(), strict=True):
            if key in own:
                store.allocate(key, (n, folded, *leaf.shape[1:]), leaf.dtype, next_use)

    def _batched(self) -> list[tuple[Tensor, int]]:
        """What batched leaves are like, and the rows that belong to one sample."""
        return [(leaf, len(leaf) // 2) for leaf, batched in zip(self.constants, self.batched, strict=True) if batched]

    def write(self, store: ActivationStore, start: int, tree: Any) -> None:
        own = set(self.stored())
        for key, leaf in zip(self.all_keys(), self._samples(tree_flatten(tree)[0]), strict=True):
            if key in own:
                store.write(key, start, leaf)

    def _samples(self, leaves: list[Any]) -> list[Tensor]:
        """Batched leaves of a value, `[n, folded, ...]`."""
        if len(leaves) != len(self.places):
            raise ValueError(
                f"{self.unit} takes or gives {len(self.places)} values, and {len(leaves)} for some samples"
            )
        found = []
        for leaf, place, known in zip(leaves, self.places, self.constants, strict=True):
            if place is None:
                continue
            folded = len(known) // 2
            if leaf.movedim(place.dim, 0).shape[1:] != known.shape[1:] or leaf.shape[place.dim] % folded:
                raise ValueError(
                    f"{self.unit} takes or gives tensors of shapes {tuple(leaf.shape)} and {tuple(known.shape)} for "
                    "samples whose inputs have the same shapes and masks: such networks cannot be calibrated"
                )
            found.append(place.samples_first(leaf, folded))
        return found

    def fill(self, batched: list[Tensor]) -> Any:
        """The structure with batched leaves, `[n, folded, ...]` each."""
        values = iter(batched)
        leaves = [
            constant if place is None else place.put_back(next(values))
            for place, constant in zip(self.places, self.constants, strict=True)
        ]
        return tree_unflatten(leaves, self.spec)

    def by_sample(self, tree: Any, n: int) -> list[Tensor]:
        """The floating-point leaves of a value, samples first: the batched ones, or else what all n samples share."""
        leaves = tree_flatten(tree)[0]
        batched = [x.flatten(0, 1) for x in self._samples(leaves) if x.is_floating_point()]
        shared = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
        return batched or [x.expand(n, *x.shape) for x in shared]

    def read(self, store: ActivationStore, rows: slice | Tensor) -> Any:
        return self.fill([store.read(key, rows) for key in self.all_keys()])

    def placeholder(self, n: int, in_memory: bool) -> Any:
        """Zeros of the right shape, that take no memory unless the network changes them in place."""
        zeros = [leaf.new_zeros(()).expand(n, folded, *leaf.shape[1:]) for leaf, folded in self._batched()]
        return self.fill([z.clone() for z in zeros] if in_memory else zeros)


def condition_key(path: str, group: int) -> str:
    """The key of an input of the network, which all units that read it share."""
    return f"condition.{path}@{group}"


def find_place(unit: str, small: Any, large: Any, values: Mapping[int, Tensor] | None = None) -> Place | None:
    """Where the samples lie in a leaf, given its values for two samples and for these and a third; None if nowhere.

    Args:
        unit: name of the unit.
        small: the leaf for two samples.
        large: the leaf for three.
        values: `UnitCalls.rows` of leaves that have no values of their own.

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
                folded = small.shape[grown[0]] // 2
                a, b = ((values or {}).get(id(x), x.movedim(grown[0], 0)) for x in (small, large))
                for is_inner in (False, True):
                    rows = Place(0, is_inner)
                    if _alike(rows.samples_first(a, folded), rows.samples_first(b, folded)[:2]):
                        return Place(grown[0], is_inner)
                change = f"whose values, of shape {tuple(small.shape)}, depend on who else is in the batch"
            else:
                shapes = f"{tuple(small.shape)} for two samples and {tuple(large.shape)} for three"
                change = f"whose shape {shapes} does not grow with them"
    elif isinstance(small, Tensor) or isinstance(large, Tensor) or type(small) is not type(large):
        change = "that is one for some batches only"
    else:
        return None
    raise ValueError(f"{unit} takes or gives a tensor {change}: it cannot be captured; exclude the layers of this unit")


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether values are equal, but for what other sizes of a batch change in the last bits of deep networks."""
    tolerance = 0.1 if a.dtype in (torch.float16, torch.bfloat16) else 0.01
    a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
    return is_close(a, b, tolerance)
