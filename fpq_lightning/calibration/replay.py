"""Carrying a calibration set through a network, a unit at a time, on two paths.

The network's own forward runs with its units replaced by stubs: a unit before the current one returns its stored
output, the current one hands over its inputs and stops the pass. What lies between the units (skip connections,
additions, embeddings) is thus computed by the network itself, whatever its architecture, and every unit is
evaluated once for each path and sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fpq_lightning.calibration.store import ActivationStore
from fpq_lightning.calibration.trajectories import CalibrationSet
from fpq_lightning.layers import running
from fpq_lightning.model.blocks import Unit

Path = str  # "full_precision" or "quantized"
PATHS: tuple[Path, Path] = ("full_precision", "quantized")


class _Stop(Exception):  # noqa: N818
    """Ends a forward pass once the current unit's inputs are known."""


@contextmanager
def _stubs(units: list[Unit], stub: Any) -> Iterator[None]:
    for index, unit in enumerate(units):
        # An instance attribute hides the class's forward, and only for this module.
        unit.module.forward = lambda *args, _index=index, **kwargs: stub(_index, args, kwargs)
    try:
        yield
    finally:
        for unit in units:
            del unit.module.forward


class _Tree:
    """A structure of tensors whose batch-major leaves lie in the store.

    Which leaves are batch-major is told by two passes with batches of different size.
    """

    def __init__(self, name: str, small: Any, large: Any) -> None:
        self.name = name
        leaves, self.spec = tree_flatten(small)
        other = tree_flatten(large)[0]
        self.constants: list[Any] = leaves
        self.batched = [
            isinstance(a, Tensor) and a.ndim > 0 and len(a) == 2 and len(b) == 3
            for a, b in zip(leaves, other, strict=True)
        ]

    def stored(self) -> list[str]:
        return [f"{self.name}.{i}" for i, batched in enumerate(self.batched) if batched]

    def allocate(self, store: ActivationStore, n: int, next_use: int) -> None:
        for key, leaf in zip(self.stored(), self._batched_of(self.constants), strict=True):
            store.allocate(key, (n, *leaf.shape[1:]), leaf.dtype, next_use)

    def _batched_of(self, leaves: list[Any]) -> list[Tensor]:
        return [leaf for leaf, batched in zip(leaves, self.batched, strict=True) if batched]

    def write(self, store: ActivationStore, start: int, tree: Any) -> None:
        for key, leaf in zip(self.stored(), self._batched_of(tree_flatten(tree)[0]), strict=True):
            store.write(key, start, leaf)

    def fill(self, batched: list[Tensor]) -> Any:
        values = iter(batched)
        leaves = [next(values) if b else c for b, c in zip(self.batched, self.constants, strict=True)]
        return tree_unflatten(leaves, self.spec)

    def read(self, store: ActivationStore, rows: slice | Tensor) -> Any:
        return self.fill([store.read(key, rows) for key in self.stored()])

    def placeholder(self, n: int) -> Any:
        """Zeros of the right shape that take no memory."""
        return self.fill([leaf.new_zeros(()).expand(n, *leaf.shape[1:]) for leaf in self._batched_of(self.constants)])


class NetworkReplay:
    """A network at one of its units, with what that unit sees and should give.

    Args:
        model: the network, its units' layers quantized classes.
        units: in execution order, of `trace_units`.
        calibration: keyword arguments of the network, and weights of the samples.
        store: for activations.
        micro_batch: samples a pass.
        quantized_inputs: whether `inputs` of a unit come from the quantized path.
    """

    def __init__(
        self,
        model: nn.Module,
        units: list[Unit],
        calibration: CalibrationSet,
        store: ActivationStore,
        micro_batch: int = 64,
        quantized_inputs: bool = True,
    ) -> None:
        self.model = model
        self.units = units
        self.store = store
        self.micro_batch = micro_batch
        self.quantized_inputs = quantized_inputs
        self.position = 0
        self._inputs = calibration.inputs
        self._weights = calibration.weights.to(store.device)
        self.n = len(calibration)
        self._last_use = [max((k for k, u in enumerate(units) if i in u.sources), default=i) for i in range(len(units))]
        self._input_trees, self._output_trees = self._templates()

    @property
    def unit(self) -> Unit:
        """The current unit."""
        return self.units[self.position]

    def _network_inputs(self, rows: slice) -> dict[str, Any]:
        device = self.store.device
        return {k: v[rows].to(device) if isinstance(v, Tensor) and v.ndim else v for k, v in self._inputs.items()}

    @torch.no_grad()
    def _templates(self) -> tuple[list[_Tree], list[_Tree]]:
        """Structures of the inputs and outputs of every unit."""
        seen: dict[int, list[tuple[Any, Any]]] = {2: [], 3: []}
        for size, found in seen.items():
            hooks = [
                unit.module.register_forward_hook(
                    lambda module, args, kwargs, output, found=found: found.append(((args, kwargs), output)),
                    with_kwargs=True,
                )
                for unit in self.units
            ]
            rows = torch.arange(size) % self.n
            inputs = {k: v[rows] if isinstance(v, Tensor) and v.ndim else v for k, v in self._inputs.items()}
            try:
                self.model(**{k: v.to(self.store.device) if isinstance(v, Tensor) else v for k, v in inputs.items()})
            finally:
                for hook in hooks:
                    hook.remove()
        pairs = list(zip(seen[2], seen[3], strict=True))
        inputs_trees = [_Tree("inputs", a[0], b[0]) for a, b in pairs]
        return inputs_trees, [_Tree(str(i), a[1], b[1]) for i, (a, b) in enumerate(pairs)]

    def _output_tree(self, path: Path, index: int) -> _Tree:
        tree = self._output_trees[index]
        tree.name = f"{path}.{index}"
        return tree

    def _batches(self) -> Iterator[slice]:
        return (slice(i, min(i + self.micro_batch, self.n)) for i in range(0, self.n, self.micro_batch))

    def _unit_inputs(self, path: Path, rows: slice) -> Any:
        """What the current unit is called with, on one path."""
        captured = None

        def stub(index: int, args: tuple, kwargs: dict) -> Any:
            nonlocal captured
            if index == self.position:
                captured = (args, kwargs)
                raise _Stop
            tree = self._output_tree(path, index)
            if index in self.unit.sources:
                return tree.read(self.store, rows)
            return tree.placeholder(rows.stop - rows.start)

        with _stubs(self.units, stub), suppress(_Stop):
            self.model(**self._network_inputs(rows))
        return captured

    @torch.no_grad()
    def capture(self) -> None:
        """Stores the current unit's inputs on the quantized path and its full-precision outputs."""
        index, unit = self.position, self.unit
        inputs = self._input_trees[index]
        inputs.allocate(self.store, self.n, next_use=index)
        targets = self._output_tree("full_precision", index)
        targets.allocate(self.store, self.n, next_use=index)
        for rows in self._batches():
            args, kwargs = self._unit_inputs("full_precision", rows)
            with running(unit.module, "full_precision"):
                output = unit.module(*args, **kwargs)
            self._output_tree("full_precision", index).write(self.store, rows.start, output)
            if self.quantized_inputs:
                args, kwargs = self._unit_inputs("quantized", rows)
            inputs.write(self.store, rows.start, (args, kwargs))

    def is_on_device(self) -> bool:
        """Whether what an optimisation step reads lies on the compute device."""
        trees = (self._input_trees[self.position], self._output_tree("full_precision", self.position))
        return all(self.store.on_device(key) for tree in trees for key in tree.stored())

    def call(self, inputs: Any) -> Any:
        """Runs the current unit."""
        args, kwargs = inputs
        return self.unit.module(*args, **kwargs)

    def inputs(self, rows: slice | Tensor) -> Any:
        """Captured inputs of the current unit."""
        return self._input_trees[self.position].read(self.store, rows)

    def targets(self, rows: slice | Tensor) -> list[Tensor]:
        """Full-precision outputs of the current unit, floating-point leaves only."""
        tree = self._output_tree("full_precision", self.position)
        return output_leaves(tree.read(self.store, rows))

    def weights(self, rows: slice | Tensor) -> Tensor:
        """How much errors on samples matter, `[n]`."""
        return self._weights[rows.to(self._weights.device) if isinstance(rows, Tensor) else rows]

    @torch.no_grad()
    def advance(self) -> None:
        """Stores the current unit's quantized outputs, forgets what no later unit needs, and moves on."""
        index, unit = self.position, self.unit
        later = self._last_use[index] > index
        if later:
            self._output_tree("quantized", index).allocate(self.store, self.n, self._next_use(index))
            with running(unit.module, "learned"):
                for rows in self._batches():
                    if self.quantized_inputs:
                        args, kwargs = self.inputs(rows)
                    else:
                        args, kwargs = self._unit_inputs("quantized", rows)
                    output = unit.module(*args, **kwargs)
                    self._output_tree("quantized", index).write(self.store, rows.start, output)
        for key in self._input_trees[index].stored():
            self.store.free(key)
        for source in range(index + 1):
            for path in PATHS:
                if source == index and path == "quantized" and not later:
                    continue
                self._settle(path, source, index)
        self.position += 1

    def _next_use(self, source: int) -> int:
        return min(k for k, u in enumerate(self.units) if source in u.sources and k > self.position)

    def _settle(self, path: Path, source: int, index: int) -> None:
        """Frees an output after its last use, or says when it is needed next."""
        if self._last_use[source] == index:
            for key in self._output_tree(path, source).stored():
                self.store.free(key)
        elif self._last_use[source] > index:
            for key in self._output_tree(path, source).stored():
                self.store.schedule(key, self._next_use(source))


def output_leaves(output: Any) -> list[Tensor]:
    """The floating-point tensors of a unit's output."""
    return [x for x in tree_flatten(output)[0] if isinstance(x, Tensor) and x.is_floating_point()]
