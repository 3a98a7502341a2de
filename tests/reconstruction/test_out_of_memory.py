"""Running out of memory: what is tried again with less, what it leaves of the result, and where it ends."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Outcome, fit_arguments, quantized_files, run_fpq, save_tiny, tiny_pipeline
from torch import Tensor

from fpq_lightning import CalibrationDataModule, Recipe, RoundingRecipe, SamplerConfig, quantize
from fpq_lightning.calibration.replay import NetworkReplay
from fpq_lightning.calibration.store import ActivationStore
from fpq_lightning.nn.calibrated import QuantizedLayer, quantized_layers
from fpq_lightning.reconstruction import backward as backward_module
from fpq_lightning.reconstruction.backward import Backward
from fpq_lightning.reconstruction.initialise import _Places
from fpq_lightning.reconstruction.out_of_memory import gradients
from fpq_lightning.reconstruction.report import UnitReport
from fpq_lightning.reconstruction.unit import UnitTrainer

LAYERS = ["conv_in", "mid_block.resnets.*"]
UNIT = "mid_block.resnets.0"  # the fifth of 12
MICRO_BATCH = 8


class Shortage:
    """Makes quantized layers run out of memory, at calls that the test chooses.

    Attributes:
        left: how many times memory runs out from now on.

    Args:
        monkeypatch: of pytest.
        owner: of the function in which memory is short; everywhere if None.
        name: of that function.
        entry: which call of it for the unit `UNIT` is the first one short of memory.
        after: passes through a layer that it still does in such a call.
        most: samples that a pass through a layer may take; none by default.
        times: `left`.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        owner: Any = None,
        name: str = "",
        entry: int = 1,
        after: int = 0,
        most: int = 0,
        times: int = 10**9,
    ) -> None:
        self.entry, self.after, self.most, self.left = entry, after, most, times
        self._entries = self._passes = 0
        self._short = owner is None
        operate, energy = QuantizedLayer.operate, _Places.energy

        def passing(samples: int) -> None:
            self._passes += 1
            if self._short and self.left and self._passes > self.after and samples > self.most:
                self.left -= 1
                raise torch.OutOfMemoryError("out of memory, says the test")

        def operating(layer: Any, x: Tensor, *args: Any) -> Tensor:
            passing(len(x))
            return operate(layer, x, *args)

        def measuring(places: _Places, *args: Any) -> Tensor:
            passing(-(-len(places._found[0][0]) // places._passes))
            return energy(places, *args)

        monkeypatch.setattr(QuantizedLayer, "operate", operating)
        monkeypatch.setattr(_Places, "energy", measuring)
        if owner is not None:
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, function: Callable) -> Callable:
        def watched(this: Any, *args: Any) -> Any:
            replay = this if isinstance(this, NetworkReplay) else getattr(this, "objective", this).replay
            with self._in_call(replay.unit.name == UNIT):
                return function(this, *args)

        return watched

    @contextmanager
    def _in_call(self, counts: bool) -> Any:
        self._entries += counts
        before, self._short = self._short, counts and self._entries >= self.entry
        self._passes = 0
        try:
            yield
        finally:
            self._short = before


@dataclass
class Run:
    """A finished run."""

    directory: Path
    reports: dict[str, UnitReport]
    codes: dict[str, list[Tensor] | None]
    warned: list[str]


class _Reports(pl.Callback):
    def __init__(self) -> None:
        self.reports: list[UnitReport] = []

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.reports = pl_module.reports


def run(directory: Path, n_search: int = MICRO_BATCH, ckpt_path: str | None = None, **rounding: Any) -> Run:
    pipeline, keep = tiny_pipeline(), _Reports()
    recipe = Recipe(
        include=LAYERS,
        rounding=RoundingRecipe(
            **{
                "start": "nearest",
                "learned": True,
                "iterations": 20,
                "learning_rate": 0.02,
                "batch_size": 4,
                **rounding,
            }
        ),
    )
    data = CalibrationDataModule(n_samples=32, n_search=n_search, micro_batch=MICRO_BATCH, held_out_fraction=0.125)
    sampler = SamplerConfig(steps=4, batch_size=4)
    options: dict[str, Any] = {"accelerator": "cpu", "callbacks": [keep], "enable_progress_bar": False}
    options |= {"base_model": "tiny", "ckpt_path": ckpt_path}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize(pipeline, recipe, directory, data, sampler, **options)
    warned = [str(w.message) for w in caught if "memory" in str(w.message)]
    reports = {report.name: report for report in keep.reports if report.weight_formats}
    layers: Any = quantized_layers(pipeline.unet)
    codes = {name: layer.variants["quantized"].codes for name, layer in layers.items() if layer.variants}
    return Run(directory, reports, codes, warned)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    found = run(tmp_path_factory.mktemp("undisturbed") / "run")
    assert list(found.reports) == ["conv_in", UNIT, "mid_block.resnets.1"]
    assert [r.kept for r in found.reports.values()] == ["learned"] * 3, found.reports
    assert found.codes["conv_in"]
    assert found.warned == []
    return found


def assert_close(found: Run, expected: Run) -> None:
    """The same but for the order of sums."""
    first, reference_codes = found.codes["conv_in"] or [], expected.codes["conv_in"] or []
    assert len(first) == len(reference_codes)
    assert all(torch.equal(a, b) for a, b in zip(first, reference_codes, strict=True))
    assert found.reports.keys() == expected.reports.keys()
    for name, report in found.reports.items():
        reference = expected.reports[name]
        for attribute in ("weight_formats", "activation_formats", "kept", "iterations"):
            assert getattr(report, attribute) == getattr(reference, attribute), f"{name}: {attribute}"
        assert report.error_nearest == pytest.approx(reference.error_nearest, rel=0.05)
        assert report.error_quantized == pytest.approx(reference.error_quantized, rel=0.05)


# --- tried again with less -------------------------------------------------------------------------------------

WORK: dict[str, tuple[Any, str, int, int]] = {
    "capturing the second part": (NetworkReplay, "capture", 1, 5),
    "moving on with the second part": (NetworkReplay, "advance", 1, 3),
    "collecting what layers see": (UnitTrainer, "_search", 1, 1),
    "searching": (UnitTrainer, "_search", 1, 6),
    "measuring nearest rounding": (UnitTrainer, "_error", 1, 0),
    "measuring learned rounding": (UnitTrainer, "_error", 2, 1),
    "correcting biases": (UnitTrainer, "correct_bias", 1, 2),
    "measuring corrected biases": (UnitTrainer, "_error", 3, 0),
}


@pytest.mark.parametrize("work", WORK)
def test_work_that_runs_out_of_memory_is_done_again_with_less(
    work: str, undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, entry, after = WORK[work]
    shortage = Shortage(monkeypatch, owner, name, entry, after, times=2)
    found = run(tmp_path / "run")
    assert shortage.left == 0
    assert len(found.warned) == 2
    for message, samples in zip(found.warned, (4, 2), strict=True):
        assert message.startswith("cpu is out of memory")
        assert f" {samples} samples a pass" in message
        assert "data.micro_batch" in message
    assert_close(found, undisturbed)


@pytest.mark.parametrize("after", [0, 2])
def test_a_step_that_runs_out_of_memory_takes_fewer_samples_at_a_time(
    after: int, undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Shortage(monkeypatch, Backward, "_run", entry=3, after=after, times=2)
    found = run(tmp_path / "run")
    assert [re.findall(r"\d+ samples", message) for message in found.warned] == [["2 samples"], ["1 samples"]]
    assert_close(found, undisturbed)


def test_a_device_that_holds_few_samples_at_a_time_gives_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tmp_path / "enough", n_search=3)
    Shortage(monkeypatch, most=3)
    found = run(tmp_path / "little", n_search=3)
    assert sum("2 samples a pass" in message for message in found.warned) == 1
    assert sum("2 samples at a time" in message for message in found.warned) == 3  # of a step, once for each unit
    assert_close(found, expected)


def test_a_unit_kept_at_nearest_rounding_stays_so_when_memory_runs_out_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = 1e6  # learns to round at random
    expected = run(tmp_path / "enough", learning_rate=rate)
    assert {report.kept for report in expected.reports.values()} == {"nearest"}
    shortage = Shortage(monkeypatch, UnitTrainer, "correct_bias", times=1)
    found = run(tmp_path / "little", learning_rate=rate)
    assert shortage.left == 0
    assert_close(found, expected)


# --- where nothing can be done ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


HOPELESS: dict[str, tuple[Any, str]] = {
    "capturing": (NetworkReplay, "capture"),
    "searching": (UnitTrainer, "_search"),
    "learning": (Backward, "_run"),
    "moving on": (NetworkReplay, "advance"),
}


@pytest.mark.parametrize("work", HOPELESS)
@pytest.mark.filterwarnings("ignore:.*out of memory.*")
def test_work_for_which_there_is_never_enough_memory_ends_in_one_line_and_leaves_the_last_checkpoint(
    work: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(name: str, *more: str) -> Outcome:
        include = f"--recipe.include={LAYERS}".replace(" ", "")
        return run_fpq(capsys, [*fit_arguments(model, tmp_path / name), include, *more])

    with monkeypatch.context() as patch:
        Shortage(patch, *HOPELESS[work])
        try:
            outcome = fit("little")
        except torch.OutOfMemoryError as error:
            pytest.fail(f"left the command as {type(error).__name__}: {error}")
    assert outcome.code != 0
    assert len(outcome.errors) == 1
    assert "memory" in outcome.errors[0]
    assert outcome.err.rstrip().splitlines()[-1] == outcome.errors[0]
    state = torch.load(tmp_path / "little" / "checkpoints" / "last.ckpt", weights_only=True)["fpq"]
    assert state["unit"] == 4
    assert state["reports"][4]["name"] == UNIT
    assert not (tmp_path / "little" / "quantized").exists()
    # With enough memory the run goes on.
    resumed = fit("little", "--ckpt_path=last")
    assert resumed.code == 0, resumed.err
    assert fit("enough").code == 0
    assert quantized_files(tmp_path / "little") == quantized_files(tmp_path / "enough")


def test_a_run_whose_error_is_still_held_is_gone_on_with_in_the_same_process(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A notebook keeps the last error, and with it all that its frames refer to.
    with monkeypatch.context() as patch:
        Shortage(patch, Backward, "_run")
        with pytest.raises(torch.OutOfMemoryError) as held:
            run(tmp_path / "run")
    found = run(tmp_path / "run", ckpt_path="last")
    assert held.value.__traceback__ is not None
    assert_close(found, undisturbed)


# --- the store -------------------------------------------------------------------------------------------------

operations = st.lists(
    st.tuples(
        st.sampled_from(["allocate", "allocate", "allocate", "shrink", "schedule", "promote", "free"]),
        st.integers(0, 60),
        st.integers(0, 20),
    ),
    max_size=30,
)


def make_store(budget: int, host: int) -> ActivationStore:
    store = ActivationStore(torch.device("cpu"), budget=budget)
    store.budgets["host"] = host
    return store


@given(operations, st.integers(0, 600), st.sampled_from([0, 150, 10**6]))
def test_a_shrunk_store_keeps_to_its_new_budget_and_loses_nothing(
    sequence: list[tuple[str, int, int]], budget: int, host: int
) -> None:
    store = make_store(budget, host)
    expected: dict[str, Tensor] = {}
    for i, (what, number, next_use) in enumerate(sequence):
        keys = list(expected)
        key = keys[number % len(keys)] if keys else ""
        if what == "allocate":
            expected[f"k{i}"] = torch.randn(number, 1, generator=torch.Generator().manual_seed(i))
            store.allocate(f"k{i}", (number, 1), torch.float32, next_use)
            store.write(f"k{i}", 0, expected[f"k{i}"])
        elif what == "shrink":
            store.shrink(10 * number)
            budget = min(budget, 10 * number)
        elif key and what == "schedule":
            store.schedule(key, next_use)
        elif key and what == "promote":
            store.promote(key)
        elif key:
            store.free(key)
            del expected[key]
        assert store.budgets["device"] == budget
        assert store.used("device") <= budget
        assert store.used("host") <= host
        assert sum(store.used(t) for t in ("device", "host", "disk")) == sum(4 * len(v) for v in expected.values())
        for k, values in expected.items():
            assert torch.equal(store.read(k, slice(0, len(values))), values)
    store.close()


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 20)), max_size=12),
    st.integers(0, 1500),
    st.sampled_from([0, 150]),
)
def test_shrinking_moves_out_what_is_needed_latest_and_no_more_than_it_must(
    arrays: list[tuple[int, int]], budget: int, host: int
) -> None:
    store = make_store(10**6, host)
    for i, (floats, next_use) in enumerate(arrays):
        store.allocate(f"k{i}", (floats,), torch.float32, next_use)
    store.shrink(budget)
    kept = [(floats, use) for i, (floats, use) in enumerate(arrays) if store.on_device(f"k{i}")]
    moved = [(floats, use) for i, (floats, use) in enumerate(arrays) if not store.on_device(f"k{i}")]
    soonest = min((use for _, use in moved), default=100)
    assert all(use <= soonest for _, use in kept)
    if moved:  # the one moved last would not have fitted
        last = max(floats for floats, use in moved if use == soonest)
        assert 4 * (last + sum(floats for floats, _ in kept)) > budget
    store.close()


def test_shrinking_to_more_than_the_budget_changes_nothing() -> None:
    store = make_store(40, 0)
    store.allocate("a", (10,), torch.float32, 1)
    store.shrink(1000)
    assert store.budgets["device"] == 40
    assert store.on_device("a")
    store.close()


# --- gradients of parts of a batch -----------------------------------------------------------------------------


class _DoneError(Exception):
    pass


class _Probe(pl.Callback):
    """Hands the unit `UNIT` to a function once it is being learned, and ends the run."""

    def __init__(self, use: Callable[[UnitTrainer], None]) -> None:
        self.use = use

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.units[pl_module.plan.unit].name == UNIT:
            self.use(pl_module.unit_trainer)
            raise _DoneError


def with_unit(directory: Path, use: Callable[[UnitTrainer], None], micro_batch: int = 8) -> None:
    recipe = Recipe(include=LAYERS, rounding=RoundingRecipe(start="nearest", learned=True, iterations=10, batch_size=8))
    data = CalibrationDataModule(n_samples=16, n_search=8, micro_batch=micro_batch, held_out_fraction=0.25)
    with pytest.raises(_DoneError):
        quantize(
            tiny_pipeline(),
            recipe,
            directory,
            data,
            SamplerConfig(steps=4, batch_size=4),
            base_model="tiny",
            accelerator="cpu",
            callbacks=[_Probe(use)],
            enable_progress_bar=False,
        )


ROWS = torch.tensor([0, 9, 2, 11, 4, 5, 6, 7])
SCHEDULE = torch.tensor([5.0, 0.7, 0.0, 0.5])  # with a regulariser, and soft


def one_step(backward: Backward, rows: Tensor = ROWS) -> float:
    backward.plan(rows[None], ROWS[None], SCHEDULE[None])
    return backward().sum().item()


def _gradients(unit: UnitTrainer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in unit.variables() if p.grad is not None}


def test_the_gradient_does_not_depend_on_how_many_samples_are_taken_at_a_time_or_by_which_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, tuple[float, dict[str, Tensor]]] = {}

    def use(unit: UnitTrainer) -> None:
        backward = unit.backward
        assert backward is not None
        assert backward.chunk == len(ROWS)
        with torch.enable_grad():
            for chunk in (8, 3, 1):
                backward.chunk = chunk
                found[f"{chunk} at a time"] = one_step(backward), _gradients(unit)
            monkeypatch.setattr(backward_module, "world_size", lambda: 2)
            monkeypatch.setattr(backward_module, "sum_over_ranks", lambda sums: sums)
            parts = []
            for rank, chunk in ((0, 4), (1, 3)):
                part = Backward(backward.objective, len(ROWS) // 2, torch.device("cpu"))
                part.chunk = chunk
                error = one_step(part, ROWS[rank::2])
                parts.append((error, _gradients(unit)))
        (a, first), (b, second) = parts
        assert all(not torch.allclose(first[name], second[name]) for name in first if name.endswith(".v"))
        found["two processes"] = a + b, {name: first[name] + second[name] for name in first}

    with_unit(tmp_path / "run", use)
    error, gradients = found.pop("8 at a time")
    assert error > 0
    assert len(gradients) == 9  # rounding and scales of weights and inputs of three layers
    for how, (other_error, others) in found.items():
        assert other_error == pytest.approx(error, rel=1e-4), how
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            scale = gradient.abs().max().item()
            assert scale > 0, name
            assert torch.allclose(others[name], gradient, rtol=1e-4, atol=1e-5 * scale), f"{how}: {name}"


def test_a_pass_that_failed_half_way_leaves_nothing_in_the_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(unit: UnitTrainer) -> None:
        backward = unit.backward
        assert backward is not None
        backward.chunk = 2
        with torch.enable_grad():
            expected = one_step(backward), _gradients(unit)
            backward.plan(ROWS[None], ROWS[None], SCHEDULE[None])
            shortage = Shortage(monkeypatch, Backward, "_run", after=7, times=1)
            with pytest.raises(torch.OutOfMemoryError):
                backward()
            assert any(not torch.equal(g, expected[1][name]) for name, g in _gradients(unit).items())
            assert shortage.left == 0
            again = backward().sum().item(), _gradients(unit)
        assert again[0] == expected[0]
        assert all(torch.equal(g, expected[1][name]) for name, g in again[1].items())

    with_unit(tmp_path / "run", use)


def test_a_step_is_not_cut_into_parts_while_its_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    replay: Any = SimpleNamespace(store=SimpleNamespace(device=torch.device("cuda")))

    class Short:
        chunk = 8

        def __call__(self) -> Tensor:
            if self.chunk > 2:
                raise torch.OutOfMemoryError("out of memory, says the test")
            return torch.ones(())

    backward: Any = Short()
    with pytest.raises(torch.OutOfMemoryError, match="says the test"):
        gradients(replay, backward)
    assert backward.chunk == 8
    capturing[0] = False
    with pytest.warns(UserWarning, match="samples at a time"):
        assert gradients(replay, backward) == 1
    assert backward.chunk == 2


def test_the_search_does_not_depend_on_how_many_samples_a_pass_takes(tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    for micro_batch in (8, 3, 1):

        def use(unit: UnitTrainer) -> None:
            states = {name: layer.variants["nearest"].to_state() for name, layer in unit.layers.items()}  # type: ignore[operator]
            found.append(states)

        with_unit(tmp_path / str(micro_batch), use, micro_batch)
    whole, *others = found
    assert len(whole) == 3
    for other in others:
        for name, state in whole.items():
            for kind in ("weights", "inputs"):
                for expected, quantizer in zip(state[kind], other[name][kind], strict=True):
                    assert quantizer["format"] == expected["format"]
                    assert torch.allclose(quantizer["scale"], expected["scale"], rtol=1e-4), name


def test_steps_planned_together_are_the_steps_planned_one_by_one(tmp_path: Path) -> None:
    rows = torch.stack([ROWS, ROWS.roll(1) // 8 * 8 + ROWS % 8, ROWS % 8, ROWS])
    schedule = torch.tensor([[5.0, 0.7, 0.0, 1.0], [2.0, 0.0, 1.0, 0.5], [3.0, 1.0, 1.0, 0.25], [2.5, 0.1, 0.0, 0.0]])

    def use(unit: UnitTrainer) -> None:
        backward = unit.backward
        assert backward is not None

        def steps(*planned: int) -> list[tuple[float, float, dict[str, Tensor]]]:
            at = list(planned)
            backward.plan(rows[at], rows[at], schedule[at])
            return [(backward().sum().item(), backward.rate.item(), _gradients(unit)) for _ in at]

        with torch.enable_grad():
            together = [*steps(0, 1, 2), *steps(3)]
            alone = [found for i in range(4) for found in steps(i)]
        assert [rate for _, rate, _ in together] == schedule[:, 3].tolist()
        assert len({error for error, _, _ in together}) > 2
        for (error, rate, own), (other, other_rate, others) in zip(together, alone, strict=True):
            assert (error, rate) == (other, other_rate)
            assert all(torch.equal(g, others[name]) for name, g in own.items())

    with_unit(tmp_path / "run", use)


def test_reports_are_complete_after_a_run(undisturbed: Run) -> None:
    for report in undisturbed.reports.values():
        assert [key for key, value in asdict(report).items() if value is None] == ["error_closed_form"]
