"""Samples, batches and seeds are shared out over processes: each thing once, and every process gets its part."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fpq_lightning.calibration.shards import Samples, Shard
from fpq_lightning.diffusion.sampling import batches_of
from fpq_lightning.training.datamodule import UnitBatches


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, int, int]:
    """Strata, processes (no more of them than strata), samples (possibly fewer than strata)."""
    strata = draw(st.integers(1, 12))
    return strata, draw(st.integers(1, strata)), draw(st.integers(0, 60))


@st.composite
def drawn(draw: st.DrawFn) -> tuple[UnitBatches, int, int]:
    """Batches of a unit, samples that they are drawn from, processes."""
    batch_size = draw(st.integers(1, 12))
    n = draw(st.integers(batch_size, 60))
    batches = UnitBatches(draw(st.integers(0, 99)), draw(st.integers(0, 99)), n, batch_size, draw(st.integers(1, 25)))
    return batches, n, draw(st.integers(1, batch_size))


def shards(strata: int, world_size: int) -> list[Shard]:
    return [Shard(strata, rank, world_size) for rank in range(world_size)]


def stacked(batches: UnitBatches) -> Tensor:
    return torch.cat(list(batches))


# --- samples ---------------------------------------------------------------------------------------------------


@given(splits())
def test_every_sample_is_owned_by_exactly_one_process(split: tuple[int, int, int]) -> None:
    strata, world_size, n = split
    owned = [shard.owned(n) for shard in shards(strata, world_size)]
    assert sorted(torch.cat(owned).tolist()) == list(range(n))
    for rank, rows in enumerate(owned):
        assert rows.tolist() == sorted(rows.tolist())
        assert set(Shard(strata, 0, world_size).owner(rows).tolist()) <= {rank}


@given(splits())
def test_local_is_the_position_among_the_samples_owned(split: tuple[int, int, int]) -> None:
    strata, world_size, n = split
    for shard in shards(strata, world_size):
        owned = shard.owned(n)
        assert shard.local(owned).tolist() == list(range(len(owned)))


@given(splits(), st.randoms(use_true_random=False))
def test_placement_covers_rows_exactly_once_in_the_order_each_process_has_them(
    split: tuple[int, int, int], random: Random
) -> None:
    strata, world_size, n = split
    rows = torch.tensor(random.sample(range(n), n // 2), dtype=torch.long)
    placements = [shard.placement(rows) for shard in shards(strata, world_size)]
    positions = placements[0]
    assert sorted(torch.cat(positions).tolist()) == list(range(len(rows)))
    for shard, placement in zip(shards(strata, world_size), placements, strict=True):
        assert [p.tolist() for p in placement] == [p.tolist() for p in positions]  # all processes agree
        assert rows[placement[shard.rank]].tolist() == shard.of_rank(rows).tolist()


@given(splits())
def test_a_process_finds_what_samples_are_for_among_its_own(split: tuple[int, int, int]) -> None:
    strata, world_size, n = split
    every = torch.arange(n)
    found = []
    for shard in shards(strata, world_size):
        samples = Samples(n, every[: n // 2], every[n // 2 :], every[: n // 4], shard)
        found.append(shard.owned(n)[samples.local(samples.held_out)])
    assert sorted(torch.cat(found).tolist()) == list(range(n // 2, n))


def test_a_single_process_has_every_sample_where_it_is() -> None:
    shard = Shard(5)
    rows = torch.tensor([7, 0, 12])
    assert shard.owned(13).tolist() == list(range(13))
    assert shard.local(rows).tolist() == rows.tolist()
    assert shard.local_batch(torch.arange(5)).tolist() == list(range(5))


@pytest.mark.parametrize(("strata", "world_size"), [(1, 2), (3, 8)])
def test_more_processes_than_samples_of_a_batch_are_refused_with_the_option_to_raise(
    strata: int, world_size: int
) -> None:
    with pytest.raises(ValueError, match=r"recipe\.rounding\.batch_size") as refused:
        Shard(strata, 0, world_size)
    assert f"{strata} samples" in str(refused.value)
    assert f"{world_size} processes" in str(refused.value)


# --- batches ---------------------------------------------------------------------------------------------------


@given(drawn())
def test_a_batch_has_one_sample_of_every_stratum(case: tuple[UnitBatches, int, int]) -> None:
    batches, n, _ = case
    rows = stacked(batches)
    assert rows.shape == (batches.steps, len(batches.strata))
    assert (rows % len(batches.strata) == torch.arange(len(batches.strata))).all()
    assert (rows >= 0).all()
    assert (rows < n).all()


@given(drawn())
def test_the_processes_parts_of_a_batch_are_together_the_batch(case: tuple[UnitBatches, int, int]) -> None:
    batches, n, world_size = case
    strata = len(batches.strata)
    rows = stacked(batches)
    parts = []
    for shard in shards(strata, world_size):
        local = shard.local_batch(rows)
        assert local.shape == (len(rows), len(range(shard.rank, strata, world_size)))
        parts.append(shard.owned(n)[local])  # raises if the process does not hold them
    assert torch.cat(parts, dim=1).sort(1).values.tolist() == rows.sort(1).values.tolist()


def test_batches_draw_every_sample_about_equally_often_whatever_the_size_of_its_stratum() -> None:
    n, batch_size, steps = 50, 8, 4000  # strata of 7, 7, 6, 6, 6, 6, 6, 6 samples
    counts = Counter(stacked(UnitBatches(0, 3, n, batch_size, steps)).flatten().tolist())
    assert sorted(counts) == list(range(n))
    for sample, count in counts.items():
        size = len(range(sample % batch_size, n, batch_size))
        assert abs(count - steps / size) < 5 * (steps / size) ** 0.5
    assert max(counts.values()) < 1.5 * min(counts.values())


def test_strata_of_one_step_are_drawn_independently() -> None:
    places = stacked(UnitBatches(0, 0, 40, 4, 4000)) // 4  # each uniform in 0..9
    correlation = torch.corrcoef(places.double().T)
    assert (correlation - torch.eye(4)).abs().max() < 0.08


# --- seeds -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 100), st.integers(1, 80), st.integers(1, 20), st.integers(1, 9))
def test_batches_cover_the_seeds_in_order_and_leave_no_process_without(
    first: int, n: int, size: int, world_size: int
) -> None:
    seeds = range(first, first + n)
    batches = list(batches_of(seeds, size, world_size))
    assert [seed for batch in batches for seed in batch] == list(seeds)
    assert all(0 < len(batch) <= size for batch in batches)
    if n >= world_size:
        assert all(batches[rank::world_size] for rank in range(world_size))


def test_batches_of_a_single_process_are_as_large_as_asked_for() -> None:
    assert [len(batch) for batch in batches_of(range(10), 4)] == [4, 4, 2]
