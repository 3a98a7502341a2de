"""Which process holds which sample of a calibration set, and what samples are for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The samples of one process.

    Sample i is of stratum ``i % strata``, and strata go round the processes. A batch takes one sample of every
    stratum, so that it splits over any number of processes without moving a sample.

    Attributes:
        strata: size of a batch.
        rank: number of the process.
        world_size: number of processes.

    Raises:
        ValueError: if there are fewer strata than processes.
    """

    strata: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.strata < self.world_size:
            raise ValueError(
                f"a batch of {self.strata} samples cannot be split over {self.world_size} processes: raise "
                "recipe.rounding.batch_size or take fewer devices"
            )

    def owner(self, rows: Tensor) -> Tensor:
        """Ranks of the processes that hold samples, int64."""
        return rows % self.strata % self.world_size

    def owned(self, n: int) -> Tensor:
        """The samples among n that this process holds, int64, ascending."""
        return self.of_rank(torch.arange(n))

    def of_rank(self, rows: Tensor) -> Tensor:
        """Those of the samples that this process holds, in the order given."""
        return rows[self.owner(rows) == self.rank]

    def local(self, rows: Tensor) -> Tensor:
        """Where samples that this process holds lie among those of `owned`."""
        strata_here = -(-(self.strata - self.rank) // self.world_size)
        return rows // self.strata * strata_here + rows % self.strata // self.world_size

    def local_batch(self, batch: Tensor) -> Tensor:
        """This process's part of a batch `[..., strata]` of one sample of each stratum, as in `local`."""
        return self.local(batch[..., self.rank :: self.world_size])

    def placement(self, rows: Tensor) -> list[Tensor]:
        """For each rank, the positions of its samples among `rows`, int64."""
        return [(self.owner(rows) == rank).nonzero().flatten() for rank in range(self.world_size)]


@dataclass(frozen=True)
class Samples:
    """Which samples of the calibration set serve what; indices are among all samples.

    Attributes:
        n: samples in all.
        train: to learn from, int64.
        held_out: to choose between learned and nearest rounding by.
        search: to choose formats and clips by.
        shard: where they lie.
    """

    n: int
    train: Tensor
    held_out: Tensor
    search: Tensor
    shard: Shard

    def local(self, rows: Tensor) -> Tensor:
        """Those of the samples that this process holds, as indices among its own."""
        return self.shard.local(self.shard.of_rank(rows))
