"""Carrying a calibration set through a network, a unit at a time, on two paths.

The network's own forward runs with its units replaced by stubs: a unit before the current one returns its stored
output, the current one hands over its inputs and stops the pass. What lies between the units (skip connections,
additions, embeddings) is thus computed by the network itself, whatever its architecture, and every unit is
evaluated once for each path and sample.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from fpq_lightning.calibration.axes import LEADING
from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.calibration.store import ActivationStore
from fpq_lightning.calibration.stored_tree import StoredTree, condition_key
from fpq_lightning.calibration.unit_calls import UnitCalls, glimpse, not_called
from fpq_lightning.graph.chain import Chain, parts_of
from fpq_lightning.graph.tree import named_leaves
from fpq_lightning.graph.units import Unit
from fpq_lightning.nn.calibrated import Mode, running
from fpq_lightning.utils.closeness import is_close
from fpq_lightning.utils.distributed import gather_rows

Path = str  # "full_precision" or "quantized"
PATHS: tuple[Path, Path] = ("full_precision", "quantized")
_NOT_CALIBRATED = "such networks cannot be calibrated (FPQConfig quantizes them without)"
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


@dataclass(frozen=True)
class _Chunk:
    """Samples of one group: where they lie in the set, and in the store's arrays of the group."""

    group: int
    rows: slice | Tensor
    places: slice

    def __len__(self) -> int:
        return self.places.stop - self.places.start


class NetworkReplay:
    """A network at one of its units, with what that unit sees and should give.

    Samples of one group (`CalibrationSet.group_of`) can be in one batch; the store has arrays for each group.

    Args:
        model: the network, its units' layers quantized classes.
        units: in execution order, of `trace_units`.
        calibration: keyword arguments of the network, and weights of the samples.
        store: for activations.
        micro_batch: samples a pass, at most. On a GPU there are no more than fit a quarter of the store's budget there.
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
        self._bytes_a_sample = [0] * len(units)  # that a pass of each unit takes beyond its inputs, as far as known
        self._glimpses: list[Any] = []  # of the inputs of each unit for two samples of a group
        self._last_use = [max((k for k, u in enumerate(units) if i in u.sources), default=i) for i in range(len(units))]
        self._group_of = cast(Tensor, calibration.group_of).clone()
        self._groups = [(self._group_of == g).nonzero().flatten() for g in self._group_of.unique().tolist()]
        self._places = torch.empty(self.n, dtype=torch.int64)  # of each sample in the arrays of its group
        for g, rows in enumerate(self._groups):
            self._group_of[rows], self._places[rows] = g, torch.arange(len(rows))
        templates = [self._templates(g, rows) for g, rows in enumerate(self._groups)]
        self._input_trees = [[inputs[i] for inputs, _ in templates] for i in range(len(units))]
        self._output_trees = [[outputs[i] for _, outputs in templates] for i in range(len(units))]

    @property
    def unit(self) -> Unit:
        """The current unit."""
        return self.units[self.position]

    @property
    def samples_a_pass(self) -> int:
        """The most samples that a pass of the current unit takes."""
        each = self._bytes_a_sample[self.position]
        fitting = self.store.budgets["device"] // 4 // each if each else self.micro_batch
        return max(1, min(self.micro_batch, fitting))

    @torch.no_grad()
    def _templates(self, group: int, rows: Tensor) -> tuple[list[StoredTree], list[StoredTree]]:
        """Structures of the inputs and outputs of every unit for samples of a group."""
        # Of what grows with the batch shape and type are enough, and of large networks there is no room for more. So a
        # pass finds out what grows, before two see the values of what does not.
        found: UnitCalls | None = None
        passes = []
        for n in (3, 2, 3):
            found = UnitCalls(self.units, self.store.device, found)
            batch = self._calibration.batch(rows[torch.arange(n) % len(rows)], self.store.device)  # may be emptied
            leading = {path: x for path, x in named_leaves(batch) if self._is_leading(path)}
            found.run(self.model, batch, leading)
            passes.append(found)
        _, small, large = passes
        for i, size in enumerate(large.bytes):
            self._bytes_a_sample[i] = max(self._bytes_a_sample[i], size // 3)
        if len(rows) > 1 and not self._glimpses:
            self._glimpses = small.glimpses
        values, names = small.rows | large.rows, [unit.name for unit in self.units]
        input_trees = [
            StoredTree("inputs", name, a, b, small.given, group, values)
            for name, a, b in zip(names, small.inputs, large.inputs, strict=True)
        ]
        output_trees = [
            StoredTree("outputs", name, a, b, group=group, values=values)
            for name, a, b in zip(names, small.outputs, large.outputs, strict=True)
        ]
        for unit, tree in zip(self.units, output_trees, strict=True):
            if unit.layers and not tree.holds_targets():
                raise ValueError(f"{unit.name} gives no tensor, but changes what it is given: {_NOT_CALIBRATED}")
        return input_trees, output_trees

    def _is_leading(self, path: str) -> bool:
        """Whether an input of the network is one tensor whose leading dimension holds the samples."""
        calibration = self._calibration
        return isinstance(calibration.inputs.get(path), Tensor) and calibration.axis(path) == LEADING

    def _named(self, trees: list[StoredTree], name: str) -> list[StoredTree]:
        for tree in trees:
            tree.name = name
        return trees

    def _outputs(self, path: Path, index: int) -> list[StoredTree]:
        """The outputs of a unit on one path, for each group."""
        return self._named(self._output_trees[index], f"{path}.{index}")

    def _references(self) -> list[StoredTree]:
        """The full-precision inputs of the current unit, for each group."""
        return self._named([copy.copy(tree) for tree in self._input_trees[self.position]], "reference")

    def _batches(self) -> Iterator[_Chunk]:
        """All samples, `samples_a_pass` at a time."""
        for g, rows in enumerate(self._groups):
            for start in range(0, len(rows), self.samples_a_pass):
                places = slice(start, min(start + self.samples_a_pass, len(rows)))
                yield _Chunk(g, places if len(self._groups) == 1 else rows[places], places)

    def chunks(self, rows: Tensor, size: int | None = None) -> Iterator[Tensor]:
        """Samples in parts that can be in one batch each.

        Args:
            rows: indices of samples, int64.
            size: the most in a part; None is `samples_a_pass`.
        """
        return self._calibration.chunks(rows, size or self.samples_a_pass)

    def _locate(self, rows: slice | Tensor) -> tuple[int, slice | Tensor]:
        """The group of some samples, and where they lie in it."""
        if len(self._groups) == 1:
            return 0, rows
        indices = torch.arange(self.n)[rows] if isinstance(rows, slice) else rows.cpu()
        groups = self._group_of[indices]
        if (groups != groups[0]).any():
            raise ValueError("samples of several groups cannot be in one batch: take them from NetworkReplay.chunks")
        return int(groups[0]), self._places[indices]

    def _unit_inputs(self, path: Path, chunk: _Chunk) -> Any:
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
            tree = self._outputs(path, index)[chunk.group]
            if index in self.unit.sources:
                output = tree.read(self.store, chunk.places)
            else:
                output = tree.placeholder(len(chunk), self._placeholders_in_memory)
            if not isinstance(self.units[index].module, Chain):
                return output
            outputs[index] = output
            return output[0]

        try:
            with _stubs(self.units, stub), suppress(_Stop):
                self.model(**self._calibration.batch(chunk.rows, self.store.device))
        except RuntimeError as error:
            if self._placeholders_in_memory or "single memory location" not in str(error):
                raise
            self._placeholders_in_memory = True  # the network changes outputs of units in place
            return self._unit_inputs(path, chunk)
        if captured is None:
            raise not_called(self.unit)
        return captured

    def _check_stubs(self) -> None:
        """Finds out that the unit is given something else where outputs stand for the earlier units.

        Raises:
            ValueError: if it is.
        """
        group = next((g for g, rows in enumerate(self._groups) if len(rows) > 1), None)
        if group is None:
            return
        two = _Chunk(group, self._groups[group][:2], slice(0, 2))
        try:
            given = tree_map(glimpse, self._unit_inputs("full_precision", two))
        except Exception as error:  # whatever a network may raise that misses something
            if "out of memory" in str(error):
                raise
            raise _bypassed(self.unit) from error
        (some, spec), (others, other_spec) = tree_flatten(given), tree_flatten(self._glimpses[self.position])
        if spec != other_spec or not all(map(_alike, some, others)):
            raise _bypassed(self.unit)

    @torch.no_grad()
    def capture(self, to_learn: bool = True) -> None:
        """Stores the current unit's inputs on the quantized path and its full-precision outputs.

        Args:
            to_learn: whether the unit is going to be quantized; else only `advance` follows.
        """
        index, unit = self.position, self.unit
        if to_learn:
            with running(self.model, "full_precision"):
                self._check_stubs()
        for path in self._missing_conditions():
            self._allocate_condition(path)
            for chunk in self._batches():
                values = self._calibration.inputs[path][chunk.rows, None]
                self.store.write(condition_key(path, chunk.group), chunk.places.start, values)
        inputs, targets, *reference = self._allocate_capture(to_learn)
        # Layers may also run between the units: DiT embeds the timestep once more with its first block's layers. A mode
        # is set once for all batches, as a large network has thousands of modules to look through.
        with running(self.model, _MODES[self._input_path]):
            for chunk in self._batches():
                captured = self._unit_inputs(self._input_path, chunk)
                inputs[chunk.group].write(self.store, chunk.places.start, captured)
        with running(self.model, "full_precision"):
            for chunk in self._batches():
                args, kwargs = self._unit_inputs("full_precision", chunk)
                for trees in reference:
                    trees[chunk.group].write(self.store, chunk.places.start, (args, kwargs))
                output = unit.module(*args, **kwargs)
                tree = self._outputs("full_precision", index)[chunk.group]
                tree.write(self.store, chunk.places.start, output)
        self._settle_sources()  # the unit's own inputs are all that is needed from here on
        for tree in [*inputs, *targets] if to_learn else []:
            for key in tree.all_keys():
                self.store.promote(key)

    def _missing_conditions(self) -> list[str]:
        """Inputs of the network that the current unit reads and that are not in the store yet."""
        found = dict.fromkeys(path for tree in self._input_trees[self.position] for path in tree.conditions())
        return [path for path in found if not self.store.holds(condition_key(path, 0))]

    def _allocate_condition(self, path: str) -> None:
        value = self._calibration.inputs[path]
        for g, size in enumerate(self._sizes()):
            self.store.allocate(condition_key(path, g), (size, 1, *value.shape[1:]), value.dtype, self.position)

    def _sizes(self) -> list[int]:
        """Samples of each group; `rehearse` asks for other numbers than there are."""
        return [-(-len(rows) * self.n // len(self._weights)) for rows in self._groups]

    def _allocate_capture(self, to_learn: bool = True) -> list[list[StoredTree]]:
        """Makes room for the unit's inputs, its outputs and, if they are kept, its full-precision inputs."""
        trees = [self._input_trees[self.position], self._outputs("full_precision", self.position)]
        if self._keeps_reference and to_learn:
            trees.append(self._references())
        for of_groups in trees:
            for tree, size in zip(of_groups, self._sizes(), strict=True):
                tree.allocate(self.store, size, next_use=self.position)
        return trees

    def is_on_device(self) -> bool:
        """Whether what an optimisation step reads lies on the compute device, in one array for all samples."""
        trees = (*self._input_trees[self.position], *self._outputs("full_precision", self.position))
        return len(self._groups) == 1 and all(self.store.on_device(key) for tree in trees for key in tree.all_keys())

    def call(self, inputs: Any) -> Any:
        """Runs the current unit."""
        args, kwargs = inputs
        return self.unit.module(*args, **kwargs)

    def inputs(self, rows: slice | Tensor) -> Any:
        """Captured inputs of the current unit, for samples of one group."""
        group, places = self._locate(rows)
        return self._input_trees[self.position][group].read(self.store, places)

    def reference_inputs(self, rows: slice | Tensor) -> Any:
        """Captured inputs of the current unit on the full-precision path, for samples of one group."""
        if not self._keeps_reference:
            return self.inputs(rows)
        group, places = self._locate(rows)
        return self._references()[group].read(self.store, places)

    def gathered_inputs(self, rows: Tensor, placement: list[Tensor]) -> Iterator[tuple[Tensor, Any]]:
        """Captured inputs for samples of all processes, `samples_a_pass` at a time, and their positions.

        Args:
            rows: those of this process.
            placement: for each rank, where its rows go.
        """
        if len(self._groups) > 1:  # then there is one process
            positions = placement[0]
            for chunk in self.chunks(torch.arange(len(rows))):
                yield positions[chunk], self.inputs(rows[chunk])
            return
        tree = self._input_trees[self.position][0]
        leaves = [gather_rows(self.store.read(key, rows), placement) for key in tree.all_keys()]
        every = torch.arange(sum(len(part) for part in placement))
        for positions in every.split(self.samples_a_pass):
            some = slice(int(positions[0]), int(positions[-1]) + 1)
            yield positions, tree.fill([leaf[some] for leaf in leaves])

    @torch.no_grad()
    def target_energies(self) -> Tensor:
        """`sample_energies` of the current unit in full precision, `[n, outputs]`."""
        parts = [sample_energies(self.targets(chunk.rows), self.weights(chunk.rows)) for chunk in self._batches()]
        found = torch.cat(parts)
        return found if len(self._groups) == 1 else found[torch.cat(self._groups).argsort().to(found.device)]

    def targets(self, rows: slice | Tensor) -> list[Tensor]:
        """Full-precision outputs of the current unit as `by_sample` gives them, for samples of one group."""
        group, places = self._locate(rows)
        tree = self._outputs("full_precision", self.position)[group]
        return tree.by_sample(tree.read(self.store, places), self._count(rows))

    def by_sample(self, output: Any, rows: slice | Tensor) -> list[Tensor]:
        """The floating-point leaves of an output of the current unit that differ from sample to sample, samples first.

        Args:
            output: of the unit.
            rows: the samples that it is of, of one group.
        """
        return self._output_trees[self.position][self._locate(rows)[0]].by_sample(output, self._count(rows))

    def _count(self, rows: slice | Tensor) -> int:
        return len(range(*rows.indices(self.n))) if isinstance(rows, slice) else len(rows)

    def weights(self, rows: slice | Tensor) -> Tensor:
        """How much errors on samples matter, `[n]`."""
        return self._weights[rows.to(self._weights.device) if isinstance(rows, Tensor) else rows]

    @torch.no_grad()
    def advance(self) -> None:
        """Stores the current unit's quantized outputs, forgets what no later unit needs, and moves on."""
        index, unit = self.position, self.unit
        if self._allocate_advance():
            with running(unit.module, "quantized"):
                for chunk in self._batches():
                    args, kwargs = self.inputs(chunk.rows)
                    output = unit.module(*args, **kwargs)
                    self._outputs("quantized", index)[chunk.group].write(self.store, chunk.places.start, output)
        self._release()
        self.position += 1

    def _allocate_advance(self) -> bool:
        """Makes room for the unit's quantized outputs, if a later unit reads them."""
        index = self.position
        read_later = self.quantized_inputs and self._last_use[index] > index
        if read_later:
            for tree, size in zip(self._outputs("quantized", index), self._sizes(), strict=True):
                tree.allocate(self.store, size, self._next_use(index))
        return read_later

    def _release(self) -> None:
        own = self._input_trees[self.position]
        for tree in [*own, *(self._references() if self._keeps_reference else [])]:
            for key in tree.stored():
                self.store.free(key)
        for path in PATHS if self.quantized_inputs else PATHS[:1]:
            self._settle(path, self.position)
        for tree in own:
            for name in tree.conditions():
                later = [
                    k
                    for k, trees in enumerate(self._input_trees)
                    if k > self.position and name in trees[tree.group].conditions()
                ]
                if later:
                    self.store.schedule(condition_key(name, tree.group), later[0])
                else:
                    self.store.free(condition_key(name, tree.group))

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
        for tree in self._outputs(path, source):
            for key in tree.stored():
                if self._last_use[source] <= self.position:
                    self.store.free(key)
                else:
                    self.store.schedule(key, self._next_use(source))


def _bypassed(unit: Unit) -> ValueError:
    return ValueError(
        f"{unit.name} reads something else than outputs of earlier units: they pass it on in a state of their own, or "
        f"by changing what they are given: {_NOT_CALIBRATED}"
    )


def _alike(a: Any, b: Any) -> bool:
    """Whether two glimpses are of the same value, but for last bits that add up in deep networks."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b)
    return a.shape == b.shape and is_close(a, b, 0.1)


def sample_energies(leaves: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Weighted mean square of each sample in each tensor.

    Args:
        leaves: `[n, ...]` each, or with further dimensions folded into the first.
        weights: of the samples, `[n]`.

    Returns:
        `[n, leaves]`.
    """
    return torch.stack([x.float().reshape(len(weights), -1).square().mean(1) * weights for x in leaves], dim=1)
