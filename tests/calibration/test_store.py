"""The activation store against a plain dictionary of tensors, and its budget at every moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fpq_lightning.calibration import host_memory
from fpq_lightning.calibration.host_memory import HostMemory
from fpq_lightning.calibration.store import ActivationStore, parse_bytes

CPU = torch.device("cpu")


def make_store(directory: Path | None = None, budget: int = 1000, host: int = 0, **options: object) -> ActivationStore:
    """A store on the CPU; with `host` it has a second tier as beside a GPU."""
    store = ActivationStore(CPU, budget=budget, directory=directory, **options)  # type: ignore[arg-type]
    store.budgets["host"] = host
    return store


def put(store: ActivationStore, key: str, floats: int, next_use: int) -> Tensor:
    """Allocates and fills `[floats, 1]` float32."""
    values = torch.randn(floats, 1, generator=torch.Generator().manual_seed(len(key) + floats + next_use))
    store.allocate(key, (floats, 1), torch.float32, next_use)
    store.write(key, 0, values)
    return values


def files(directory: Path) -> list[Path]:
    return [p for p in directory.rglob("*") if p.is_file()]


# --- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 * 2**30),
        ("4 GiB", 4 * 2**30),
        ("512MB", 512 * 2**20),
        ("512m", 512 * 2**20),
        ("1.5k", 1536),
        ("2TiB", 2**41),
        ("100B", 100),
        ("1000000", 1000000),
        (12345, 12345),
        ("0", 0),
        (" 1 kib ", 1024),
    ],
)
def test_bytes_are_read(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "four", "4XB", "-1", "4 Gi B", "1.2.3", "1e9", ".", "4GiB/s"])
def test_what_is_no_number_of_bytes_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="4GiB"):
        parse_bytes(text)


# --- reading and writing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [10**6, 0])
def test_what_was_written_is_read_back_by_slice_and_by_index(tmp_path: Path, budget: int) -> None:
    store = make_store(tmp_path, budget)
    values = torch.randn(10, 2, 3)
    store.allocate("a", (10, 2, 3), torch.float32, next_use=1)
    for start in range(0, 10, 4):
        store.write("a", start, values[start : start + 4])
    assert torch.equal(store.read("a", slice(0, 10)), values)
    assert torch.equal(store.read("a", slice(3, 7)), values[3:7])
    index = torch.tensor([9, 0, 0, 5])
    assert torch.equal(store.read("a", index), values[index])
    assert store.on_device("a") == (budget > 0)
    assert store.used("device") == (240 if budget else 0)
    assert store.used("disk") == (0 if budget else 240)


@pytest.mark.parametrize("budget", [10**6, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_are_kept_in_the_stores_type_and_read_in_their_own(
    tmp_path: Path, budget: int, dtype: torch.dtype
) -> None:
    store = make_store(tmp_path, budget, dtype=dtype)
    values = torch.randn(6, 5)
    store.allocate("a", (6, 5), torch.float32, next_use=1)
    store.write("a", 0, values)
    result = store.read("a", slice(0, 6))
    assert result.dtype == torch.float32
    assert torch.equal(result, values.to(dtype).float())
    assert store.used("device") + store.used("disk") == 60


@pytest.mark.parametrize("budget", [10**6, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_is_never_kept_in_more_nor_in_another_half(
    tmp_path: Path, budget: int, dtype: torch.dtype
) -> None:
    store = make_store(tmp_path, budget, dtype=dtype)
    values = torch.randn(6, 5).mul(1e6).bfloat16()
    store.allocate("a", (6, 5), values.dtype, next_use=1)
    store.write("a", 0, values)
    result = store.read("a", slice(0, 6))
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, values)
    assert store.used("device") + store.used("disk") == 60


@pytest.mark.parametrize("budget", [10**6, 0])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.uint8])
def test_other_types_are_kept(tmp_path: Path, budget: int, dtype: torch.dtype) -> None:
    store = make_store(tmp_path, budget, dtype=torch.bfloat16)
    values = torch.tensor([[1, 0], [0, 1], [1, 1]]).to(dtype)
    store.allocate("a", (3, 2), dtype, next_use=1)
    store.write("a", 0, values)
    result = store.read("a", torch.tensor([2, 0]))
    assert result.dtype == dtype
    assert torch.equal(result, values[[2, 0]])


@pytest.mark.parametrize("budget", [10**6, 0])
def test_one_value_a_sample_can_be_stored(tmp_path: Path, budget: int) -> None:
    store = make_store(tmp_path, budget)
    store.allocate("t", (4,), torch.int64, next_use=0)
    store.write("t", 1, torch.tensor([7, 8, 9]))
    assert store.read("t", torch.tensor([3, 1])).tolist() == [9, 7]


@pytest.mark.parametrize("rows", [slice(0, 4), torch.arange(4)], ids=["slice", "index"])
@pytest.mark.parametrize("budget", [10**6, 0])
def test_changing_what_was_read_does_not_change_the_store(tmp_path: Path, budget: int, rows: slice | Tensor) -> None:
    """Networks work in place on what they are given."""
    store = make_store(tmp_path, budget)
    values = put(store, "a", 4, next_use=1)
    store.read("a", rows).add_(1)
    assert torch.equal(store.read("a", rows), values)


# --- the budget ----------------------------------------------------------------------------------------------------

Operation = tuple[str, int, int]  # what, size in floats or index of an array, next use
operations = st.lists(
    st.tuples(st.sampled_from(["allocate", "allocate", "free", "schedule"]), st.integers(0, 60), st.integers(0, 20)),
    max_size=25,
)


def watch(store: ActivationStore, check: Callable[[], None]) -> None:
    """Calls `check` whenever an array has come into being, in the middle of an allocation too."""
    original = store._new

    def new(*args: object) -> object:
        check()
        return original(*args)  # type: ignore[arg-type]

    store._new = new  # type: ignore[method-assign, assignment]


@given(operations, st.integers(0, 400), st.sampled_from([0, 150, 10**6]))
def test_budget_is_never_exceeded_and_nothing_is_lost(sequence: list[Operation], budget: int, host: int) -> None:
    store = make_store(None, budget, host)

    def check() -> None:
        assert store.used("device") <= budget
        assert store.used("host") <= host

    watch(store, check)
    expected: dict[str, Tensor] = {}
    peak = 0
    for i, (what, number, next_use) in enumerate(sequence):
        keys = list(expected)
        if what == "allocate":
            expected[f"k{i}"] = put(store, f"k{i}", number, next_use)
        elif keys and what == "free":
            key = keys[number % len(keys)]
            store.free(key)
            del expected[key]
        elif keys:
            store.schedule(keys[number % len(keys)], next_use)
        check()
        peak = max(peak, store.used("device"))
        assert sum(store.used(t) for t in ("device", "host", "disk")) == sum(4 * len(v) for v in expected.values())
        for key, values in expected.items():
            assert torch.equal(store.read(key, slice(0, len(values))), values)
    assert peak <= store.peak <= budget
    store.close()


@given(operations, st.integers(0, 400))
def test_what_is_needed_later_never_keeps_out_what_is_needed_sooner(sequence: list[Operation], budget: int) -> None:
    """An array goes out only if those on the device that are needed no sooner would leave too little room."""
    store = make_store(None, budget)
    sizes: dict[str, tuple[int, int]] = {}
    for i, (_, number, next_use) in enumerate(sequence):
        size = 4 * (number + 1)
        before = {k for k in sizes if store.on_device(k)}
        store.allocate(f"k{i}", (number + 1,), torch.float32, next_use)
        needed_sooner = sum(sizes[k][0] for k in before if sizes[k][1] <= next_use)
        assert store.on_device(f"k{i}") == (needed_sooner + size <= budget)
        pushed_out = before - {k for k in sizes if store.on_device(k)}
        assert all(sizes[k][1] > next_use for k in pushed_out)
        kept = before - pushed_out
        if pushed_out and kept:  # the latest went first
            assert min(sizes[k][1] for k in pushed_out) >= max(sizes[k][1] for k in kept)
        sizes[f"k{i}"] = size, next_use
    store.close()


def test_the_array_needed_latest_is_pushed_out_first(tmp_path: Path) -> None:
    store = make_store(tmp_path, budget=12)
    values = {key: put(store, key, 1, use) for key, use in (("soon", 2), ("latest", 9), ("later", 5))}
    assert all(store.on_device(key) for key in values)
    values["now"] = put(store, "now", 1, 1)
    assert [key for key in values if not store.on_device(key)] == ["latest"]
    values["next"] = put(store, "next", 1, 1)
    assert [key for key in values if not store.on_device(key)] == ["latest", "later"]
    values["last"] = put(store, "last", 1, 10)
    assert not store.on_device("last")
    store.schedule("now", 20)
    values["again"] = put(store, "again", 1, 4)
    assert [key for key in values if store.on_device(key)] == ["soon", "next", "again"]
    for key, expected in values.items():
        assert torch.equal(store.read(key, slice(0, 1)), expected)
    store.close()


def test_an_array_larger_than_the_budget_pushes_nothing_out(tmp_path: Path) -> None:
    store = make_store(tmp_path, budget=40)
    put(store, "small", 5, next_use=100)
    put(store, "huge", 11, next_use=0)
    assert store.on_device("small")
    assert not store.on_device("huge")
    store.close()


def test_host_memory_lies_between_the_device_and_the_disk(tmp_path: Path) -> None:
    store = make_store(tmp_path, budget=8, host=12)
    values = {f"k{use}": put(store, f"k{use}", 1, use) for use in (9, 8, 7, 6, 5, 4)}
    assert [key for key in values if store.on_device(key)] == ["k5", "k4"]
    assert (store.used("device"), store.used("host"), store.used("disk")) == (8, 12, 4)
    for key, expected in values.items():
        assert torch.equal(store.read(key, slice(0, 1)), expected)
    store.free("k9")  # needed latest, so the one on disk
    assert (store.used("device"), store.used("host"), store.used("disk")) == (8, 12, 0)
    store.close()


def test_host_memory_is_locked_once_and_serves_further_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[int] = []
    monkeypatch.setattr(host_memory, "pin", lambda x: not locked.append(x.data_ptr()))
    monkeypatch.setattr(host_memory, "unpin", lambda x: locked.remove(x.data_ptr()))
    store = make_store(tmp_path, budget=20, host=640)
    rows = torch.tensor([4, 0, 4])
    for turn in range(5):
        values = {key: put(store, key, 5 + turn, 3) for key in ("first", "second", "third")}
        assert (store.used("host"), len(locked)) == (3 * 4 * (5 + turn) - (20 if turn == 0 else 0), 1)
        for key, expected in values.items():
            assert torch.equal(store.read(key, rows), expected[rows])
            assert torch.equal(store.read(key, slice(1, 3)), expected[1:3])
            store.free(key)
    store.close()
    assert locked == []


@given(
    slab=st.integers(1, 1000),
    actions=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40), st.integers(0, 300)), max_size=40),
)
def test_runs_of_host_memory_never_overlap_and_all_are_used_again(
    slab: int, actions: list[tuple[int, int, int]]
) -> None:
    memory = HostMemory(slab)
    held: dict[int, tuple[list[Tensor], int, int]] = {}
    for key, rows, row_bytes in actions:
        for run in held.pop(key, ([], 0, 0))[0]:
            memory.free(run)
        runs = memory.allocate(rows, row_bytes)
        assert sum(map(len, runs)) == rows * max(row_bytes, 1)
        assert all(len(run) % max(row_bytes, 1) == 0 and run.data_ptr() % 8 == 0 for run in runs)
        for run in runs:
            run.fill_(key + 1)
        held[key] = runs, rows, row_bytes
        assert all((run == other + 1).all() for other, (of_other, *_) in held.items() for run in of_other)
    for runs, *_ in held.values():
        for run in runs:
            memory.free(run)
    slabs = [(i, 0, len(memory)) for i, (memory, _) in enumerate(memory._slabs)]
    assert sorted(memory._free) == slabs


def test_an_array_is_promoted_to_the_device_where_it_fits(tmp_path: Path) -> None:
    store = make_store(tmp_path, budget=40)
    put(store, "a", 4, next_use=1)
    b, c = put(store, "b", 8, next_use=2), put(store, "c", 8, next_use=3)
    assert (store.used("device"), store.used("disk"), store.peak) == (16, 64, 16)
    store.promote("b")
    assert (store.used("device"), store.used("disk"), store.peak) == (16, 64, 16)
    store.free("a")
    store.promote("b")
    store.promote("c")
    assert store.on_device("b")
    assert not store.on_device("c")
    assert (store.used("device"), store.used("disk"), store.peak) == (32, 32, 32)
    assert [p.stat().st_size for p in files(tmp_path)] == [32]
    assert torch.equal(store.read("b", slice(0, 8)), b)
    assert torch.equal(store.read("c", slice(0, 8)), c)
    store.close()


def test_peak_is_the_most_that_lay_on_the_device(tmp_path: Path) -> None:
    store = make_store(tmp_path, budget=100)
    for key, floats in (("a", 10), ("b", 5)):
        put(store, key, floats, 0)
    store.free("a")
    put(store, "c", 2, 0)
    assert (store.peak, store.used("device")) == (60, 28)


# --- files ---------------------------------------------------------------------------------------------------------


def test_files_exist_only_for_what_is_on_disk_and_go_with_it(tmp_path: Path) -> None:
    store = make_store(tmp_path, budget=40)
    put(store, "a", 10, next_use=5)
    assert files(tmp_path) == []
    put(store, "b", 10, next_use=1)  # pushes a out
    assert [p.stat().st_size for p in files(tmp_path)] == [40]
    store.free("a")
    assert files(tmp_path) == []
    store.free("b")
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_close_removes_every_file_and_array(tmp_path: Path) -> None:
    store = make_store(tmp_path, budget=0)
    for i in range(3):
        put(store, f"k{i}", 4, i)
    assert len(files(tmp_path)) == 3
    store.close()
    assert list(tmp_path.iterdir()) == []
    assert store.used("disk") == store.used("device") == 0
    put(store, "again", 4, 0)  # a closed store can be used anew
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_files_go_with_a_store_that_was_never_closed(tmp_path: Path) -> None:
    store = make_store(tmp_path, budget=0)
    put(store, "a", 4, 0)
    del store
    assert list(tmp_path.iterdir()) == []
