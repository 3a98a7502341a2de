"""Carrying a calibration set through a network, a unit at a time, on two paths.

The network's own forward runs with its units replaced by stubs: a unit before the current one returns its stored
output, the current one hands over its inputs and stops the pass. What lies between the units (skip connections,
additions, embeddings) is thus computed by the network itself, whatever its architecture, and every unit is
evaluated once for each path and sample.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.calibration.store import ActivationStore
from fpq_lightning.graph.chain import Chain, parts_of
from fpq_lightning.graph.tree import flatten, output_leaves
from fpq_lightning.graph.units import Unit
from fpq_lightning.nn.calibrated import Mode, running
from fpq_lightning.utils.distributed import gather_rows

Path = str  # "full_precision" or "quantized"
PATHS: tuple[Path, Path] = ("full_precision", "quantized")
_MODES: dict[Path, Mode] = {"full_precision": "full_precision", "quantized": "quantized"}


class _Stop(Exception):  # noqa: N818
    """Ends a forward pass once the current unit's inputs are known."""


@contextmanager
def _stubs(units: list[Unit], stub: Any) -> Iterator[None]:
    """Calls ``stub(index, part, args, kwargs)`` instead of the modules of units."""
    modules = [(i, k, part) for i, unit in enumerate(units) for k, part in enumerate(parts_of(unit.module))]
    for index, part, module in modules:
        # An instance attribute hides the class's forward, and only for this module.
        module.forward = lambda *args, _place=(index, part), **kwargs: stub(*_place, args, kwargs)
    try:
        yield
    finally:
        for _, _, module in modules:
            del module.forward


class _Tree:
    """A structure of tensors whose batch-major leaves lie in the store.

    Which leaves are batch-major is told by two passes with batches of different size. Their leading dimension may
    hold other dimensions folded into it (frames, windows), sample by sample. Leaves that are the network's own inputs,
    such as embeddings of the prompt, lie in the store once for all units.
    """

    def __init__(self, name: str, unit: str, small: Any, large: Any, given: Mapping[int, str] | None = None) -> None:
        self.name = name
        leaves, self.spec = tree_flatten(small)
        other = tree_flatten(large)[0]
        self.batched = [_is_batch_major(unit, a, b) for a, b in zip(leaves, other, strict=True)]
        # Of batch-major leaves shape and type are all that is needed.
        self.constants: list[Any] = [
            leaf.new_zeros(()).expand(leaf.shape) if batched else leaf
            for leaf, batched in zip(leaves, self.batched, strict=True)
        ]
        self.given = [(given or {}).get(id(leaf)) for leaf in leaves]  # paths of the network's inputs

    def conditions(self) -> list[str]:
        """Paths of the network's inputs among the leaves."""
        return [path for path, batched in zip(self.given, self.batched, strict=True) if batched and path is not None]

    def stored(self) -> list[str]:
        """Keys of what is stored for this tree alone."""
        own = [batched and path is None for path, batched in zip(self.given, self.batched, strict=True)]
        return [f"{self.name}.{i}" for i, mine in enumerate(own) if mine]

    def all_keys(self) -> list[str]:
        """Keys of all batch-major leaves."""
        leaves = enumerate(zip(self.given, self.batched, strict=True))
        return [f"{self.name}.{i}" if path is None else _condition(path) for i, (path, batched) in leaves if batched]

    def allocate(self, store: ActivationStore, n: int, next_use: int) -> None:
        for key, leaf, folded in self._own(self.constants):
            store.allocate(key, (n, folded, *leaf.shape[1:]), leaf.dtype, next_use)

    def _own(self, leaves: list[Any]) -> Iterator[tuple[str, Tensor, int]]:
        """Key, value and fold of what is stored for this tree alone."""
        own = set(self.stored())
        found = zip(self.all_keys(), self._batched_of(leaves), self._folds(), strict=True)
        return (entry for entry in found if entry[0] in own)

    def _batched_of(self, leaves: list[Any]) -> list[Tensor]:
        return [leaf for leaf, batched in zip(leaves, self.batched, strict=True) if batched]

    def _folds(self) -> list[int]:
        """Rows of the leading dimension that belong to one sample, for each batch-major leaf."""
        return [len(leaf) // 2 for leaf in self._batched_of(self.constants)]

    def write(self, store: ActivationStore, start: int, tree: Any) -> None:
        for key, leaf, folded in self._own(tree_flatten(tree)[0]):
            store.write(key, start, leaf.unflatten(0, (-1, folded)))

    def fill(self, batched: list[Tensor]) -> Any:
        values = iter(batched)
        leaves = [next(values) if b else c for b, c in zip(self.batched, self.constants, strict=True)]
        return tree_unflatten(leaves, self.spec)

    def read(self, store: ActivationStore, rows: slice | Tensor) -> Any:
        return self.fill([store.read(key, rows).flatten(0, 1) for key in self.all_keys()])

    def placeholder(self, n: int, in_memory: bool) -> Any:
        """Zeros of the right shape, that take no memory unless the network changes them in place."""
        zeros = [
            leaf.new_zeros(()).expand(n * folded, *leaf.shape[1:])
            for leaf, folded in zip(self._batched_of(self.constants), self._folds(), strict=True)
        ]
        return self.fill([z.clone() for z in zeros] if in_memory else zeros)


def _condition(path: str) -> str:
    return f"condition.{path}"


def _is_batch_major(unit: str, small: Any, large: Any) -> bool:
    """Whether a leaf grows with the batch, given its values for batches of two and three."""
    if not isinstance(small, Tensor) or small.shape == large.shape:
        return False
    if small.shape[1:] == large.shape[1:] and len(small) * 3 == len(large) * 2:
        return True
    raise ValueError(
        f"{unit} takes or gives a tensor whose shape {tuple(small.shape)} for two samples and {tuple(large.shape)} for "
        "three does not grow with its leading dimension: it cannot be captured; exclude the layers of this unit"
    )


class NetworkReplay:
    """A network at one of its units, with what that unit sees and should give.

    Args:
        model: the network, its units' layers quantized classes.
        units: in execution order, of `trace_units`.
        calibration: keyword arguments of the network, and weights of the samples.
        store: for activations.
        micro_batch: samples a pass.
        quantized_inputs: whether `inputs` of a unit come from the quantized path.
        keep_reference: whether the inputs of a unit on the full-precision path are kept, too.
    """

    def __init__(
        self,
        model: nn.Module,
        units: list[Unit],
        calibration: CalibrationSet,
        store: ActivationStore,
        micro_batch: int = 64,
        quantized_inputs: bool = True,
        keep_reference: bool = False,
    ) -> None:
        self.model = model
        self.units = units
        self.store = store
        self.micro_batch = micro_batch
        self.quantized_inputs = quantized_inputs
        self._input_path = "quantized" if quantized_inputs else "full_precision"
        self._keeps_reference = keep_reference and quantized_inputs  # otherwise they are the inputs
        self.position = 0
        self._calibration = calibration
        self._placeholders_in_memory = False
        self._weights = calibration.weights.to(store.device)
        self.n = len(calibration)
        self._last_use = [max((k for k, u in enumerate(units) if i in u.sources), default=i) for i in range(len(units))]
        self._input_trees, self._output_trees = self._templates()

    @property
    def unit(self) -> Unit:
        """The current unit."""
        return self.units[self.position]

    @torch.no_grad()
    def _templates(self) -> tuple[list[_Tree], list[_Tree]]:
        """Structures of the inputs and outputs of every unit."""
        seen: dict[int, list[tuple[Any, Any]]] = {2: [], 3: []}
        batches: list[dict[str, Any]] = []
        for size, found in seen.items():
            calls: dict[nn.Module, tuple[Any, Any]] = {}
            parts = [part for unit in self.units for part in parts_of(unit.module)]
            hooks = [
                part.register_forward_hook(
                    lambda module, args, kwargs, output, calls=calls: calls.update({module: ((args, kwargs), output)}),
                    with_kwargs=True,
                )
                for part in parts
            ]
            batches.append(self._calibration.batch(torch.arange(size) % self.n, self.store.device))
            try:
                self.model(**batches[-1])
            finally:
                for hook in hooks:
                    hook.remove()
            for unit in self.units:
                inputs, outputs = zip(*(calls[part] for part in parts_of(unit.module)), strict=True)
                found.append((inputs[0], outputs if len(outputs) > 1 else outputs[0]))
        leaves = (leaf for name, value in batches[0].items() for leaf in flatten(name, value))
        # An input that the network changes in place is no longer what it was.
        given = {id(x): path for path, x in leaves if path in self._calibration.inputs and not x._version}
        pairs = list(zip(seen[2], seen[3], strict=True))
        names = [unit.name for unit in self.units]
        input_trees = [_Tree("inputs", name, a[0], b[0], given) for name, (a, b) in zip(names, pairs, strict=True)]
        output_trees = [_Tree("outputs", name, a[1], b[1]) for name, (a, b) in zip(names, pairs, strict=True)]
        return input_trees, output_trees

    def _output_tree(self, path: Path, index: int) -> _Tree:
        tree = self._output_trees[index]
        tree.name = f"{path}.{index}"
        return tree

    def _batches(self) -> Iterator[slice]:
        return (slice(i, min(i + self.micro_batch, self.n)) for i in range(0, self.n, self.micro_batch))

    def _unit_inputs(self, path: Path, rows: slice) -> Any:
        """What the current unit is called with, on one path, whose mode the network is in."""
        captured = None
        outputs: dict[int, Any] = {}  # of units of several parts, the first of which has run

        def stub(index: int, part: int, args: tuple, kwargs: dict) -> Any:
            nonlocal captured
            if index == self.position:
                captured = (args, kwargs)
                raise _Stop
            if part:
                return outputs.pop(index)[part]
            tree = self._output_tree(path, index)
            if index in self.unit.sources:
                output = tree.read(self.store, rows)
            else:
                output = tree.placeholder(rows.stop - rows.start, self._placeholders_in_memory)
            if not isinstance(self.units[index].module, Chain):
                return output
            outputs[index] = output
            return output[0]

        try:
            with _stubs(self.units, stub), suppress(_Stop):
                self.model(**self._calibration.batch(rows, self.store.device))
        except RuntimeError as error:
            if self._placeholders_in_memory or "single memory location" not in str(error):
                raise
            self._placeholders_in_memory = True  # the network changes outputs of units in place
            return self._unit_inputs(path, rows)
        return captured

    @torch.no_grad()
    def capture(self) -> None:
        """Stores the current unit's inputs on the quantized path and its full-precision outputs."""
        index, unit = self.position, self.unit
        for path in self._missing_conditions():
            self._allocate_condition(path)
            for rows in self._batches():
                self.store.write(_condition(path), rows.start, self._calibration.inputs[path][rows, None])
        inputs, targets, *reference = self._allocate_capture()
        # Layers may also run between the units: DiT embeds the timestep once more with its first block's layers. A mode
        # is set once for all batches, as a large network has thousands of modules to look through.
        with running(self.model, _MODES[self._input_path]):
            for rows in self._batches():
                inputs.write(self.store, rows.start, self._unit_inputs(self._input_path, rows))
        with running(self.model, "full_precision"):
            for rows in self._batches():
                args, kwargs = self._unit_inputs("full_precision", rows)
                for tree in reference:
                    tree.write(self.store, rows.start, (args, kwargs))
                output = unit.module(*args, **kwargs)
                self._output_tree("full_precision", index).write(self.store, rows.start, output)
        self._settle_sources()  # the unit's own inputs are all that is needed from here on
        for key in [*inputs.all_keys(), *targets.all_keys()]:
            self.store.promote(key)

    def _missing_conditions(self) -> list[str]:
        """Inputs of the network that the current unit reads and that are not in the store yet."""
        found = dict.fromkeys(self._input_trees[self.position].conditions())
        return [path for path in found if not self.store.holds(_condition(path))]

    def _allocate_condition(self, path: str) -> None:
        value = self._calibration.inputs[path]
        self.store.allocate(_condition(path), (self.n, 1, *value.shape[1:]), value.dtype, self.position)

    def _allocate_capture(self) -> list[_Tree]:
        """Makes room for the unit's inputs, its outputs and, if they are kept, its full-precision inputs."""
        trees = [self._input_trees[self.position], self._output_tree("full_precision", self.position)]
        if self._keeps_reference:
            trees.append(self._reference_tree())
        for tree in trees:
            tree.allocate(self.store, self.n, next_use=self.position)
        return trees

    def _reference_tree(self) -> _Tree:
        tree = copy.copy(self._input_trees[self.position])
        tree.name = "reference"
        return tree

    def is_on_device(self) -> bool:
        """Whether what an optimisation step reads lies on the compute device."""
        trees = (self._input_trees[self.position], self._output_tree("full_precision", self.position))
        return all(self.store.on_device(key) for tree in trees for key in tree.all_keys())

    def call(self, inputs: Any) -> Any:
        """Runs the current unit."""
        args, kwargs = inputs
        return self.unit.module(*args, **kwargs)

    def inputs(self, rows: slice | Tensor) -> Any:
        """Captured inputs of the current unit."""
        return self._input_trees[self.position].read(self.store, rows)

    def reference_inputs(self, rows: slice | Tensor) -> Any:
        """Captured inputs of the current unit on the full-precision path."""
        return self._reference_tree().read(self.store, rows) if self._keeps_reference else self.inputs(rows)

    def gathered_inputs(self, rows: Tensor, placement: list[Tensor]) -> Iterator[Any]:
        """Captured inputs for samples of all processes, `micro_batch` at a time.

        Args:
            rows: those of this process.
            placement: for each rank, where its rows go.
        """
        tree = self._input_trees[self.position]
        leaves = [gather_rows(self.store.read(key, rows), placement) for key in tree.all_keys()]
        for start in range(0, sum(len(part) for part in placement), self.micro_batch):
            yield tree.fill([leaf[start : start + self.micro_batch].flatten(0, 1) for leaf in leaves])

    @torch.no_grad()
    def target_energies(self) -> Tensor:
        """`sample_energies` of the current unit in full precision, `[n, outputs]`."""
        parts = [sample_energies(self.targets(rows), self.weights(rows)) for rows in self._batches()]
        return torch.cat(parts)

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
        if self._allocate_advance():
            with running(unit.module, "quantized"):
                for rows in self._batches():
                    args, kwargs = self.inputs(rows)
                    output = unit.module(*args, **kwargs)
                    self._output_tree("quantized", index).write(self.store, rows.start, output)
        self._release()
        self.position += 1

    def _allocate_advance(self) -> bool:
        """Makes room for the unit's quantized outputs, if a later unit reads them."""
        index = self.position
        read_later = self.quantized_inputs and self._last_use[index] > index
        if read_later:
            self._output_tree("quantized", index).allocate(self.store, self.n, self._next_use(index))
        return read_later

    def _release(self) -> None:
        trees = [self._input_trees[self.position], *([self._reference_tree()] if self._keeps_reference else [])]
        for key in [key for tree in trees for key in tree.stored()]:
            self.store.free(key)
        for path in PATHS if self.quantized_inputs else PATHS[:1]:
            self._settle(path, self.position)
        for name in self._input_trees[self.position].conditions():
            later = [k for k, tree in enumerate(self._input_trees) if k > self.position and name in tree.conditions()]
            if later:
                self.store.schedule(_condition(name), later[0])
            else:
                self.store.free(_condition(name))

    def rehearse(self, n: int) -> int:
        """The most bytes that the store would hold at once if this process had n samples."""
        before = self.store, self.n, self.position
        self.store, self.n = ActivationStore(torch.device("meta"), self.store.dtype, budget=2**62), n
        try:
            for position in range(len(self.units)):
                self.position = position
                for path in self._missing_conditions():
                    self._allocate_condition(path)
                self._allocate_capture()
                self._settle_sources()
                self._allocate_advance()
                self._release()
            return self.store.peak
        finally:
            self.store, self.n, self.position = before

    def _next_use(self, source: int) -> int:
        return min(k for k, u in enumerate(self.units) if source in u.sources and k > self.position)

    def _settle_sources(self) -> None:
        for source in self.unit.sources:
            for path in PATHS if self.quantized_inputs else PATHS[:1]:
                self._settle(path, source)

    def _settle(self, path: Path, source: int) -> None:
        """Frees an output after its last use, or says when it is needed next."""
        if self._last_use[source] <= self.position:
            for key in self._output_tree(path, source).stored():
                self.store.free(key)
        else:
            for key in self._output_tree(path, source).stored():
                self.store.schedule(key, self._next_use(source))


def sample_energies(leaves: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Weighted mean square of each sample in each tensor.

    Args:
        leaves: `[n, ...]` each, or with further dimensions folded into the first.
        weights: of the samples, `[n]`.

    Returns:
        `[n, leaves]`.
    """
    return torch.stack([x.float().reshape(len(weights), -1).square().mean(1) * weights for x in leaves], dim=1)
