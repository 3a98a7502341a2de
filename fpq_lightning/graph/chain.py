"""A block and the lone layer that follows it, as one module.

Resamplers and projections that read nothing but the output of the block before them hold up to a tenth of a UNet's
weights; reconstructed with it, their rounding learns from its errors and it from theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten


class Chain(nn.Module):
    """Runs a block, then another module on its outputs; gives both outputs, as the network reads either.

    Args:
        first: the block.
        second: what follows it.
        call: the structure of the second's arguments and keyword arguments.
        reads: for each leaf of it the leaf of the first's output that it is, or None.
        constants: the leaves that are none.
    """

    def __init__(self, first: nn.Module, second: nn.Module, call: TreeSpec, reads: list[int | None], constants: list):
        super().__init__()
        self.parts = nn.ModuleList([first, second])
        self._call = call
        self._reads = reads
        self._constants = constants

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Takes what the first takes."""
        first, second = self.parts
        output = first(*args, **kwargs)
        found = tree_leaves(output)
        pairs = zip(self._reads, self._constants, strict=True)
        leaves = [constant if read is None else found[read] for read, constant in pairs]
        second_args, second_kwargs = tree_unflatten(leaves, self._call)
        return output, second(*second_args, **second_kwargs)


def chained(
    first: nn.Module, output: Any, versions: list[int], second: nn.Module, args: tuple, kwargs: Mapping[str, Any]
) -> Chain | None:
    """Both as one module if the second reads the first's output as it is and no other tensor, None otherwise.

    Args:
        first: a block that has run.
        output: of it.
        versions: of the tensors in it when it was made: one that has changed since is no longer its output.
        second: the module about to run.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
    unchanged = {id(x) for x, version in zip(tensors, versions, strict=True) if x._version == version}
    places = {id(x): i for i, x in enumerate(tree_leaves(output)) if id(x) in unchanged}
    leaves, call = tree_flatten((args, dict(kwargs)))
    if any(isinstance(x, Tensor) and id(x) not in places for x in leaves):
        return None
    reads = [places[id(x)] if isinstance(x, Tensor) else None for x in leaves]
    if all(read is None for read in reads):
        return None
    return Chain(first, second, call, reads, [None if isinstance(x, Tensor) else x for x in leaves])


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The modules of the network that a unit's module stands for."""
    return list(module.parts) if isinstance(module, Chain) else [module]
