"""The replay against the network itself, run as a whole and looked into with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.calibration.replay import NetworkReplay
from fpq_lightning.calibration.store import ActivationStore
from fpq_lightning.calibration.stored_tree import find_place
from fpq_lightning.formats.numbers import parse_format
from fpq_lightning.graph.chain import Chain
from fpq_lightning.graph.trace import trace_units
from fpq_lightning.graph.tree import output_leaves
from fpq_lightning.graph.units import Unit, discover_units
from fpq_lightning.nn.calibrated import LayerQuantization, Mode, QuantizedLayer, running
from fpq_lightning.nn.convert import make_quantized
from fpq_lightning.quantization.quantizer import Granularity, Quantizer
from fpq_lightning.training.units import find_units

MakeNetwork = Callable[..., tuple[nn.Module, dict[str, Any]]]  # the fixture of conftest.py
CPU = torch.device("cpu")
E2M1, E4M3 = parse_format("e2m1"), parse_format("e4m3")


def samples(inputs: dict[str, Any], n: int, rows: slice | Tensor) -> dict[str, Any]:
    """Some samples of keyword arguments, of which what has no leading `n` is constant."""
    return {k: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == n else v for k, v in inputs.items()}


def prepare(model: nn.Module, inputs: dict[str, Any], n: int) -> list[Unit]:
    model.requires_grad_(False)
    units, splits = trace_units(model, discover_units(model), samples(inputs, n, slice(0, 1)))
    for unit in units:
        for name, layer in unit.layers.items():
            make_quantized(layer, Granularity(), splits.get(name))
    return units


def make_replay(
    model: nn.Module,
    units: list[Unit],
    inputs: dict[str, Any],
    n: int,
    store: ActivationStore | None = None,
    micro_batch: int = 64,
    quantized_inputs: bool = True,
) -> NetworkReplay:
    constants = {k: v for k, v in inputs.items() if not isinstance(v, Tensor) or not v.ndim or len(v) != n}
    per_sample = {k: v for k, v in inputs.items() if k not in constants}
    calibration = CalibrationSet(per_sample, torch.arange(n) + 0.5, constants)
    return NetworkReplay(model, units, calibration, store or ActivationStore(CPU), micro_batch, quantized_inputs)


def quantize(unit: Unit) -> None:
    """Gives a unit coarse weights and dynamic input scales, and leaves it in mode learned, as a calibration does."""
    for module in unit.layers.values():
        layer = cast(QuantizedLayer, module)
        weights = [Quantizer(E2M1, r.abs().amax(1, keepdim=True) / 6) for r in layer.weight_rows()]
        inputs = [Quantizer(E4M3, None, token_dims=layer.token_dims) for _ in layer.splits]
        layer.variants["quantized"] = LayerQuantization(weights, inputs)
        layer.set_mode("quantized")


def look_into(
    model: nn.Module, module: nn.Module, inputs: dict[str, Any], n: int, micro_batch: int, mode: Mode
) -> tuple[list[Any], list[Tensor]]:
    """What one unit of the network gets and gives, batches put together. Copies, as networks work in place."""
    if isinstance(module, Chain):
        (seen, first), (_, second) = (look_into(model, part, inputs, n, micro_batch, mode) for part in module.parts)
        return seen, [*first, *second]
    batches: list[list[Any]] = []
    given: list[list[Tensor]] = []

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        batches.append(tree_leaves(tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))))

    def after(_: nn.Module, args: tuple, output: Any) -> None:
        given.append([x.clone() for x in output_leaves(output)])

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    with torch.no_grad(), running(model, mode):
        for start in range(0, n, micro_batch):
            model(**samples(inputs, n, slice(start, start + micro_batch)))
    for hook in hooks:
        hook.remove()

    def together(found: list[list[Any]]) -> list[Any]:
        sizes = [min(micro_batch, n - start) for start in range(0, n, micro_batch)]
        joined = []
        for leaf in zip(*found, strict=True):
            batched = isinstance(leaf[0], Tensor) and all(
                x.ndim and len(x) == s for x, s in zip(leaf, sizes, strict=True)
            )
            joined.append(torch.cat(leaf) if batched else leaf[0])
        return joined

    return together(batches), together(given)


def assert_same(actual: list[Any], expected: list[Any], tolerance: float = 0.0) -> None:
    """Leaves equal to the bit, or floating-point ones with a difference of a share of their norm."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        if isinstance(b, Tensor) and b.is_floating_point() and tolerance:
            assert a.shape == b.shape
            assert (a - b).norm() <= tolerance * b.norm(), float((a - b).norm() / b.norm())
        elif isinstance(b, Tensor):
            assert torch.equal(a, b)
        else:
            assert a is b or a == b


def walk(replay: NetworkReplay) -> Iterator[Unit]:
    """Goes through the network as a calibration does; yields every unit once it is captured."""
    while replay.position < len(replay.units):
        replay.capture()
        yield replay.unit
        quantize(replay.unit)
        replay.advance()


def everything(replay: NetworkReplay) -> list[tuple[list[Any], list[Tensor]]]:
    """Inputs and targets of all units."""
    rows = torch.arange(replay.n)
    return [(tree_leaves(replay.inputs(rows)), replay.targets(rows)) for _ in walk(replay)]


# The store does not keep the memory layout of what it holds, by which convolutions choose their algorithm: results
# differ in the last bits. On the quantized path such a difference may, rarely, tip a value over to the next grid point.
ROUNDING, TIPPING = 2e-6, 5e-3


def check_against_network(
    model: nn.Module, inputs: dict[str, Any], n: int, micro_batch: int = 64, quantized_inputs: bool = True
) -> None:
    """Compares both paths with the network at every unit."""
    units = prepare(model, inputs, n)
    replay = make_replay(model, units, inputs, n, None, micro_batch, quantized_inputs)
    rows = torch.arange(n)
    parted = 0
    for unit in walk(replay):
        full_inputs, targets = look_into(model, unit.module, inputs, n, micro_batch, "full_precision")
        # Units before this one have the variant learned, those from here on run in full precision.
        quantized = look_into(model, unit.module, inputs, n, micro_batch, "quantized")[0]
        tensors = [(a, b) for a, b in zip(full_inputs, quantized, strict=True) if isinstance(a, Tensor)]
        parted += max(float((a - b).norm() / a.norm()) for a, b in tensors if a.is_floating_point()) > 3 * TIPPING
        assert_same(replay.targets(rows), targets, ROUNDING)
        seen = tree_leaves(replay.inputs(rows))
        assert_same(seen, quantized, TIPPING) if quantized_inputs else assert_same(seen, full_inputs, ROUNDING)
    first = sum(not unit.sources for unit in units)
    assert parted >= len(units) - first - 1, "the paths hardly parted, so nothing was tested"


# --- both paths are the network's ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unet", "conditional_unet", "dit", "flux"])
@pytest.mark.parametrize("quantized_inputs", [True, False])
def test_inputs_and_targets_are_those_of_the_network(
    name: str, quantized_inputs: bool, make_network: MakeNetwork
) -> None:
    model, inputs = make_network(name, n=7)
    # 7 samples in batches of 4 leave one of 3.
    check_against_network(model, inputs, 7, micro_batch=4, quantized_inputs=quantized_inputs)


def test_size_of_a_pass_does_not_matter(make_network: MakeNetwork) -> None:
    results = {}
    for micro_batch in (1, 3, 7, 64):
        model, inputs = make_network("unet", n=7)
        replay = make_replay(model, prepare(model, inputs, 7), inputs, 7, micro_batch=micro_batch)
        results[micro_batch] = everything(replay)
    for micro_batch in (1, 3, 7):
        for actual, expected in zip(results[micro_batch], results[64], strict=True):
            assert_same(actual[0], expected[0], TIPPING)
            assert_same(actual[1], expected[1], ROUNDING)
    for actual, expected in zip(results[7], results[64], strict=True):  # one pass in either case
        assert_same(actual[0] + actual[1], expected[0] + expected[1])


def test_networks_without_any_quantization_come_out_as_they_are(make_network: MakeNetwork) -> None:
    """Both paths of a network whose units get no variants are the same."""
    model, inputs = make_network("unet", n=4)
    units = prepare(model, inputs, 4)
    replay = make_replay(model, units, inputs, 4)
    rows = torch.arange(4)
    while replay.position < len(units):
        replay.capture()
        with torch.no_grad():
            assert_same(output_leaves(replay.call(replay.inputs(rows))), replay.targets(rows), ROUNDING)
        replay.advance()


def test_rows_may_come_in_any_order_and_more_than_once(make_network: MakeNetwork) -> None:
    model, inputs = make_network("unet", n=6)
    replay = make_replay(model, prepare(model, inputs, 6), inputs, 6)
    index = torch.tensor([4, 0, 0, 5])
    for i, _ in enumerate(walk(replay)):
        whole, targets = replay.inputs(slice(0, 6)), replay.targets(slice(0, 6))
        part = tree_leaves(replay.inputs(index))
        expected = [x[index] if isinstance(x, Tensor) and x.ndim and len(x) == 6 else x for x in tree_leaves(whole)]
        assert_same(part, expected)
        assert_same(replay.targets(index), [t[index] for t in targets])
        if i == 5:
            break
    assert torch.equal(replay.weights(index), torch.tensor([4.5, 0.5, 0.5, 5.5]))
    assert torch.equal(replay.weights(slice(1, 3)), torch.tensor([1.5, 2.5]))


def test_scalars_and_constants_are_handed_through() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(
            self, x: Tensor, factor: float, *, extra: dict[str, Any] | None = None
        ) -> tuple[Tensor, None, Tensor]:
            assert extra is not None
            y = self.b(self.a(x) * factor + extra["table"])
            return y, None, y.mean(1) + extra["flag"]

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block(), Block()])

        def forward(self, x: Tensor, table: Tensor, factor: float, flag: bool) -> Tensor:
            per_sample = x.new_zeros(len(x))
            for block in self.blocks:
                x, nothing, y = block(x, factor, extra={"table": table, "flag": flag})
                assert nothing is None
                per_sample = per_sample + y
            return per_sample

    torch.manual_seed(0)
    inputs = {"x": torch.randn(5, 4), "table": torch.tensor(0.7), "factor": 0.5, "flag": True}
    check_against_network(Network(), inputs, 5, micro_batch=3)


def test_a_pass_takes_no_more_samples_than_fit_a_quarter_of_the_budget() -> None:
    inputs = {"x": torch.randn(6, 3, 4)}
    for each, most, expected in ((50, 64, 2), (50, 1, 1), (500, 64, 1), (0, 64, 6)):
        model, store = Folding(), ActivationStore(CPU, budget=400)
        replay = make_replay(model, prepare(model, inputs, 6), inputs, 6, store, micro_batch=most)
        replay._bytes_a_sample = [each] * len(replay.units)
        assert {len(chunk) for chunk in replay.chunks(torch.arange(6))} == {expected}


class Popping(nn.Module):
    """Takes from a list what each block is given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x: Tensor, extras: list[Tensor]) -> Tensor:
        for block in self.blocks:
            x = block(x + extras.pop())
        return x


class Forgetting(Popping):
    """Gives each block a tensor that lies where its input has lain, if there is any."""

    def forward(self, x: Tensor, extras: list[Tensor]) -> Tensor:
        for block in self.blocks:
            place, made = id(extras[-1]), [x + extras.pop()]
            while id(made[-1]) != place and len(made) < 1000:
                made.append(made[-1].clone())
            x = block(made[-1])
        return x


@pytest.mark.parametrize("network", [Popping, Forgetting])
def test_a_list_that_the_network_empties_is_there_for_every_pass(network: type[Popping]) -> None:
    torch.manual_seed(0)
    inputs = {name: torch.randn(5, 4) for name in ("x", "extras/0", "extras/1")}
    calibration, model = CalibrationSet(inputs, torch.ones(5), {}), network()
    units = find_units(model, discover_units(model), calibration, CPU).units
    for unit in units:
        for layer in unit.layers.values():
            make_quantized(layer, Granularity())
    expected = model(inputs["x"], [inputs["extras/0"], inputs["extras/1"]])
    replay = NetworkReplay(model, units, calibration, ActivationStore(CPU), micro_batch=2, quantized_inputs=False)
    for _ in units:
        replay.capture()
        (found,) = replay.targets(slice(0, 5))
        assert torch.allclose(replay.call(replay.inputs(slice(0, 5))), found, atol=1e-6)
        replay.advance()
    assert torch.allclose(found, expected, atol=1e-6)


# --- cost ----------------------------------------------------------------------------------------------------------


def test_every_unit_runs_once_for_each_path_and_sample(
    make_network: MakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = make_network("unet", n=6)
    units = prepare(model, inputs, 6)
    replay = make_replay(model, units, inputs, 6, micro_batch=4)
    ran = {unit.name: {"full_precision": 0, "quantized": 0} for unit in units}
    first_layers = {id(next(iter(unit.layers.values()))): unit.name for unit in units}
    operate = QuantizedLayer.operate

    def counting(layer: QuantizedLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if id(layer) in first_layers:
            path = "full_precision" if layer.mode == "full_precision" else "quantized"
            ran[first_layers[id(layer)]][path] += len(x)
        return operate(layer, x, weight, bias)

    monkeypatch.setattr(QuantizedLayer, "operate", counting)
    for _ in walk(replay):
        pass
    # The last one's quantized output is needed by no unit.
    assert ran == {
        unit.name: {"full_precision": 6, "quantized": 6 if i < len(units) - 1 else 0} for i, unit in enumerate(units)
    }


@pytest.mark.parametrize("quantized_inputs", [True, False])
def test_store_holds_what_later_units_need_and_is_empty_at_the_end(
    quantized_inputs: bool, make_network: MakeNetwork
) -> None:
    model, inputs = make_network("unet", n=4)
    units = prepare(model, inputs, 4)
    store = ActivationStore(CPU)
    sizes = []
    for unit in units:
        output = look_into(model, unit.module, inputs, 4, 4, "full_precision")[1]
        sizes.append(sum(4 * x.numel() for x in output))
    replay = make_replay(model, units, inputs, 4, store, quantized_inputs=quantized_inputs)
    for position, _ in enumerate(walk(replay)):
        later = {i for i in range(position) for unit in units[position + 1 :] if i in unit.sources}
        paths = 2 if quantized_inputs else 1  # the quantized one is not walked where nothing reads it
        carried = paths * sum(sizes[i] for i in later)
        captured = sum(
            x.numel() * x.element_size() for x in tree_leaves(replay.inputs(slice(0, 4))) if isinstance(x, Tensor)
        )
        assert store.used("device") == carried + sizes[position] + captured
    assert replay.position == len(units)
    assert store.used("device") == store.used("host") == store.used("disk") == 0
    assert not store._entries


@pytest.mark.parametrize("name", ["unet", "dit", "flux"])
@pytest.mark.parametrize("quantized_inputs", [True, False])
def test_a_rehearsal_knows_the_most_that_the_store_will_hold(
    name: str, quantized_inputs: bool, make_network: MakeNetwork
) -> None:
    model, inputs = make_network(name, n=6)
    units = prepare(model, inputs, 6)
    replay = make_replay(model, units, inputs, 6, None, quantized_inputs=quantized_inputs)
    expected = replay.rehearse(6)
    twice = replay.rehearse(12)
    assert (replay.n, replay.position, replay.store.peak) == (6, 0, 0)
    for _ in walk(replay):
        pass
    assert replay.store.peak == expected > 0
    assert twice == 2 * expected


def test_the_store_never_holds_more_than_its_budget_in_a_whole_walk(tmp_path: Path, make_network: MakeNetwork) -> None:
    model, inputs = make_network("unet", n=6)
    units = prepare(model, inputs, 6)
    budget = make_replay(model, units, inputs, 6).rehearse(6) // 3
    replay = make_replay(model, units, inputs, 6, ActivationStore(CPU, budget=budget, directory=tmp_path))
    spilled = 0
    for _ in walk(replay):
        assert replay.store.used("device") <= budget
        spilled = max(spilled, replay.store.used("disk"))
    assert 0 < replay.store.peak <= budget
    assert spilled > 0


def test_what_a_unit_learns_from_is_on_the_device_if_it_fits_alone() -> None:
    """Its sources, which are needed no more, make room."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u0, self.u1, self.u2 = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.u2(self.u1(self.u0(x)))

    model, inputs, size = Chain(), {"x": torch.randn(8, 4)}, 8 * 4 * 4
    units = prepare(model, inputs, 8)
    for arrays, expected in ((1, False), (2, True)):
        store = ActivationStore(CPU, budget=arrays * size)  # inputs and targets are one array each
        replay = make_replay(model, units, inputs, 8, store)
        on_device = [replay.is_on_device() for _ in walk(replay)]
        assert on_device == [expected] * 3
        store.close()


def test_a_store_on_disk_changes_nothing(tmp_path: Path, make_network: MakeNetwork) -> None:
    results = []
    for budget in (2**30, 3000, 0):
        model, inputs = make_network("unet", n=5)
        store = ActivationStore(CPU, budget=budget, directory=tmp_path)
        replay = make_replay(model, prepare(model, inputs, 5), inputs, 5, store, micro_batch=3)
        found, on_disk = [], 0
        for _ in walk(replay):
            rows = torch.arange(5)
            found.append(tree_leaves(replay.inputs(rows)) + replay.targets(rows))
            on_disk = max(on_disk, store.used("disk"))
            assert store.used("device") <= budget
            assert replay.is_on_device() == (store.used("disk") == 0) or budget == 3000
        results.append(found)
        assert (on_disk > 0) == (budget < 2**30)
        assert store.used("disk") == 0
        assert not [p for p in tmp_path.rglob("*") if p.is_file()]
        store.close()
    assert list(tmp_path.iterdir()) == []
    for found in results[1:]:
        for actual, expected in zip(found, results[0], strict=True):
            assert_same(actual, expected)


# --- the network is left alone -------------------------------------------------------------------------------------


def test_network_runs_as_before_between_steps(make_network: MakeNetwork) -> None:
    model, inputs = make_network("unet", n=3)
    units = prepare(model, inputs, 3)

    def run() -> Tensor:
        with torch.no_grad(), running(model, "full_precision"):
            return model(**inputs).sample

    before = run()
    replay = make_replay(model, units, inputs, 3)
    for i, _ in enumerate(walk(replay)):
        if i % 5 == 0:
            assert torch.equal(run(), before)
    assert torch.equal(run(), before)
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_network_is_put_back_after_an_error() -> None:
    class Fragile(nn.Module):
        broken = False

        def __init__(self) -> None:
            super().__init__()
            self.u0, self.u1 = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.u0(x)
            if self.broken:
                raise RuntimeError("out of memory")
            return self.u1(h)

    model, inputs = Fragile(), {"x": torch.randn(4, 4)}
    replay = make_replay(model, prepare(model, inputs, 4), inputs, 4)
    replay.capture()
    replay.advance()
    model.broken = True
    with pytest.raises(RuntimeError, match="out of memory"):
        replay.capture()
    assert not any("forward" in vars(m) for m in model.modules())


# --- networks that are not purely functional -----------------------------------------------------------------------


class InPlaceStream(nn.Module):
    """A residual stream that is added to in place, and read by several units."""

    def __init__(self) -> None:
        super().__init__()
        self.u0, self.u1, self.u2, self.u3 = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.u0(x)
        h += x
        a = self.u1(h)
        b = self.u2(h)
        return self.u3(h + a + b)


class InPlaceScaling(nn.Module):
    """The output of a unit that is no longer needed is scaled in place on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.u0, self.u1, self.u2 = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.u0(x)
        h *= 2
        return self.u2(self.u1(h))


class InPlaceActivation(nn.Module):
    """Units that begin with an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ELU(inplace=True), nn.Linear(4, 4), nn.ELU(inplace=True), nn.Linear(4, 4))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x.clone()) + 0.1
        return x


@pytest.mark.parametrize("quantized_inputs", [True, False])
@pytest.mark.parametrize("network", [InPlaceStream, InPlaceScaling, InPlaceActivation])
def test_in_place_operations_are_followed(network: type[nn.Module], quantized_inputs: bool) -> None:
    torch.manual_seed(0)
    check_against_network(network(), {"x": torch.randn(5, 4)}, 5, micro_batch=3, quantized_inputs=quantized_inputs)


class Folding(nn.Module):
    """Video models fold frames into the samples, so that a unit sees a multiple of them."""

    def __init__(self) -> None:
        super().__init__()
        self.u0, self.u1, self.u2 = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        frames = self.u1(self.u0(x).reshape(-1, 4))
        return self.u2(frames.reshape(x.shape))


def test_dimensions_folded_into_the_samples_stay_with_their_sample() -> None:
    torch.manual_seed(0)
    model, inputs = Folding(), {"x": torch.randn(5, 3, 4)}
    replay = make_replay(model, prepare(model, inputs, 5), inputs, 5, micro_batch=2)
    index = torch.tensor([3, 0, 3])
    for unit in walk(replay):
        targets = look_into(model, unit.module, inputs, 5, 5, "full_precision")[1]
        quantized = look_into(model, unit.module, inputs, 5, 5, "quantized")[0]
        fold = (-1, 4) if unit.name == "u1" else (-1, 3, 4)
        for found, expected in ((replay.targets(index), targets), (tree_leaves(replay.inputs(index)), quantized)):
            by_sample = expected[0].reshape(5, 3, 4)
            assert_same(found, [by_sample[index].reshape(fold)], TIPPING)


class Transposing(Folding):
    def forward(self, x: Tensor) -> Tensor:
        return self.u2(self.u1(self.u0(x).transpose(0, 1)).transpose(0, 1))


def test_samples_may_lie_along_any_dimension_of_what_a_unit_sees() -> None:
    torch.manual_seed(0)
    model, inputs = Transposing(), {"x": torch.randn(5, 3, 4)}
    replay = make_replay(model, prepare(model, inputs, 5), inputs, 5, micro_batch=2)
    index = torch.tensor([3, 0, 3])
    for unit in walk(replay):
        full = look_into(model, unit.module, inputs, 5, 5, "full_precision")[1][0]
        quantized = look_into(model, unit.module, inputs, 5, 5, "quantized")[0][0]
        (seen,) = tree_leaves(replay.inputs(index))
        dim = int(unit.name == "u1")
        assert_same([seen], [quantized.index_select(dim, index)], TIPPING)
        assert_same(replay.targets(index), [full.movedim(dim, 0)[index]], TIPPING)
        error = replay.by_sample(replay.call(replay.inputs(index)), index)[0] - replay.targets(index)[0]
        assert error.shape == (3, 3, 4)


class FramesFirst(Folding):
    """The rows of a unit are all samples of a frame, and then those of the next."""

    def forward(self, x: Tensor) -> Tensor:
        frames = self.u1(self.u0(x).transpose(0, 1).flatten(0, 1))
        return self.u2(frames.unflatten(0, (3, -1)).transpose(0, 1))


def test_samples_may_lie_within_what_is_folded_into_their_dimension() -> None:
    torch.manual_seed(0)
    model, inputs = FramesFirst(), {"x": torch.randn(5, 3, 4)}
    replay = make_replay(model, prepare(model, inputs, 5), inputs, 5, micro_batch=2)
    index = torch.tensor([3, 0, 3])
    for unit in walk(replay):
        full = look_into(model, unit.module, inputs, 5, 5, "full_precision")[1][0]
        quantized = look_into(model, unit.module, inputs, 5, 5, "quantized")[0][0]
        if unit.name == "u1":
            full, quantized = (x.unflatten(0, (3, 5)).transpose(0, 1) for x in (full, quantized))
        expected = full[index].flatten(0, 1) if unit.name == "u1" else full[index]
        (target,) = replay.targets(index)
        assert_same([target], [expected], TIPPING)
        (seen,) = tree_leaves(replay.inputs(index))
        chosen = quantized[index]
        assert_same([seen], [chosen.transpose(0, 1).flatten(0, 1) if unit.name == "u1" else chosen], TIPPING)
        (output,) = replay.by_sample(replay.call(replay.inputs(index)), index)
        assert (output - target).abs().max() < 0.5  # its rows are those of the target


class HandingOn(nn.Module):
    """A unit that hands something on by another way than its output."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layers = way, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: Tensor, bank: Any) -> Tensor:
        output = self.layers(x)
        if self.way == "list":
            bank.append(output)
        elif self.way == "dictionary":
            bank["x"] = output
        elif self.way == "tensor":
            bank += output
        else:
            self.last = output
        return output


class Bypassing(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.blocks = way, nn.ModuleList([HandingOn(way) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        banks: dict[str, Any] = {"list": [], "dictionary": {"x": x}, "tensor": torch.zeros_like(x), "attribute": None}
        bank = banks[self.way]
        for block in self.blocks:
            x = x + block(x, bank)
            if self.way == "attribute":
                x = x + block.last
        return x


@pytest.mark.parametrize("way", ["list", "dictionary", "tensor", "attribute"])
def test_units_that_hand_on_more_than_their_outputs_are_refused(way: str) -> None:
    torch.manual_seed(0)
    model, inputs = Bypassing(way), {"x": torch.randn(5, 4)}
    replay = make_replay(model, prepare(model, inputs, 5), inputs, 5, micro_batch=5)
    with pytest.raises(ValueError, match=r"blocks.1 reads something else than outputs of earlier units") as error:
        list(walk(replay))
    assert "\n" not in str(error.value)


def test_what_depends_on_who_else_is_in_the_batch_is_refused() -> None:
    class Centred(Folding):
        def forward(self, x: Tensor) -> Tensor:
            x = self.u0(x)
            return self.u2(self.u1(x - x.mean(0, keepdim=True)))

    torch.manual_seed(0)
    model, inputs = Centred(), {"x": torch.randn(5, 3, 4)}
    with pytest.raises(ValueError, match=r"u1 takes or gives a tensor whose values.*who else is in the batch"):
        make_replay(model, prepare(model, inputs, 5), inputs, 5)


def test_a_unit_that_is_not_called_for_a_sample_is_named() -> None:
    class Choosing(Folding):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            x = self.u0(x)
            return self.u2(self.u1(x) if t.min() > 0 else x)

    torch.manual_seed(0)
    for times in ([1, 1, 1, 1, 0], [1, 0, 1, 1, 1]):
        model, inputs = Choosing(), {"x": torch.randn(5, 3, 4), "t": torch.tensor(times)}
        with pytest.raises(ValueError, match="u1 is not called for some of the samples: exclude") as error:
            list(walk(make_replay(model, prepare(model, inputs, 5), inputs, 5, micro_batch=1)))
        assert "\n" not in str(error.value)


def test_tokens_whose_number_follows_from_values_are_refused() -> None:
    class Cut(Folding):
        def forward(self, x: Tensor, length: Tensor) -> Tensor:
            return self.u2(self.u1(self.u0(x[:, : int(length.max())])))

    torch.manual_seed(0)
    model, inputs = Cut(), {"x": torch.randn(6, 3, 4), "length": torch.tensor([3, 3, 3, 2, 2, 1])}
    with pytest.raises(ValueError, match=r"u0 takes or gives tensors of shapes .* same shapes and masks"):
        list(walk(make_replay(model, prepare(model, inputs, 6), inputs, 6, micro_batch=2)))


def test_what_a_unit_sees_of_all_samples_together_is_refused_by_the_name_of_the_unit() -> None:
    class OneMore(Folding):
        def forward(self, x: Tensor) -> Tensor:
            return self.u2(self.u1(torch.cat([self.u0(x), torch.zeros(1, 3, 4)]))[:-1])

    class Average(Folding):
        def forward(self, x: Tensor) -> Tensor:
            return self.u2(x + self.u1(self.u0(x).mean(0, keepdim=True)))

    for network in (OneMore, Average):
        model, inputs = network(), {"x": torch.randn(5, 3, 4)}
        with pytest.raises(ValueError, match="u1"):
            make_replay(model, prepare(model, inputs, 5), inputs, 5)


def test_a_complex_tensor_whose_imaginary_part_depends_on_the_batch_is_refused() -> None:
    rotation = torch.polar(torch.ones(4), torch.arange(4.0))
    assert find_place("u1", rotation, rotation.clone()) is None
    with pytest.raises(ValueError, match="u1"):
        find_place("u1", rotation, rotation.conj().resolve_conj())


class Masked(Folding):
    """Sees as many tokens as the longest mask of a batch has."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        length = int(mask.sum(1).max())
        return self.u2(self.u1(self.u0(x[:, :length])))


def test_samples_of_several_shapes_are_each_what_the_network_sees_alone() -> None:
    torch.manual_seed(0)
    model = Masked()
    lengths = [3, 1, 3, 2, 1, 3, 3]
    mask = torch.tensor([[i < n for i in range(3)] for n in lengths])
    inputs = {"x": torch.randn(7, 3, 4), "mask": mask}
    calibration = CalibrationSet(inputs, torch.arange(7) + 0.5)
    assert calibration.group_of.tolist() == [0, 1, 0, 2, 1, 0, 0]
    units = prepare(model, inputs, 1)
    replay = NetworkReplay(model, units, calibration, ActivationStore(torch.device("cpu")), 2)
    for unit in walk(replay):
        alone = [
            look_into(model, unit.module, {k: v[i : i + 1] for k, v in inputs.items()}, 1, 1, "full_precision")[1][0]
            for i in range(7)
        ]
        energies = replay.target_energies()
        seen = []
        for rows in replay.chunks(torch.tensor([6, 4, 3, 2, 1, 0])):
            assert len(rows) <= 2
            for row, target in zip(rows.tolist(), replay.targets(rows)[0], strict=True):
                assert_same([target[None]], [alone[row]], TIPPING)
                assert energies[row].item() == pytest.approx(
                    (alone[row].square().mean() * (row + 0.5)).item(), rel=1e-3
                )
                seen.append(row)
            assert len(tree_leaves(replay.inputs(rows))[0]) == len(rows)
        assert sorted(seen) == [0, 1, 2, 3, 4, 6]
        with pytest.raises(ValueError, match="chunks"):
            replay.inputs(torch.tensor([0, 1]))
    replay.store.close()


def test_fewer_samples_than_the_structure_is_told_from(make_network: MakeNetwork) -> None:
    model, inputs = make_network("unet", n=2)
    check_against_network(model, inputs, 2)


def test_only_floating_point_outputs_are_targets() -> None:
    x = torch.ones(2)
    leaves = output_leaves((x, None, {"index": torch.tensor([1]), "more": [x * 2, 3.0]}))
    assert_same(leaves, [x, x * 2])


# --- what a large network must not cost -------------------------------------------------------------------------


def test_a_replay_keeps_shapes_and_not_the_activations_they_were_read_from(make_network: MakeNetwork) -> None:
    model, inputs = make_network("flux", n=6)
    replay = make_replay(model, prepare(model, inputs, 6), inputs, 6)
    for (tree,) in [*replay._input_trees, *replay._output_trees]:
        for leaf, _ in tree._batched():
            assert leaf.untyped_storage().nbytes() == leaf.element_size()


def test_modes_are_set_once_however_many_batches_are_captured(
    make_network: MakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = make_network("unet", n=6)
    calls = []
    set_mode = QuantizedLayer.set_mode
    monkeypatch.setattr(QuantizedLayer, "set_mode", lambda layer, mode: calls.append(layer) or set_mode(layer, mode))
    replay = make_replay(model, prepare(model, inputs, 6), inputs, 6)
    found = []
    for replay.micro_batch in (6, 1):
        calls.clear()
        replay.capture()
        found.append(len(calls))
    assert found[0] == found[1]
