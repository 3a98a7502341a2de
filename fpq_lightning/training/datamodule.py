"""The calibration sets as a LightningDataModule, spread over the processes of a run."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.calibration.disk import MADE_FROM, is_calibration_set, load_calibration_sets, save_calibration_sets
from fpq_lightning.calibration.key import CalibrationKey
from fpq_lightning.calibration.noised_images import noise_real_images
from fpq_lightning.calibration.shards import Samples, Shard
from fpq_lightning.calibration.store import ActivationStore, parse_bytes
from fpq_lightning.calibration.trajectories import sample_calibration_sets
from fpq_lightning.diffusion.images import load_images
from fpq_lightning.diffusion.sampling import SamplerConfig
from fpq_lightning.training.placement import Placement
from fpq_lightning.training.plan import Plan
from fpq_lightning.utils import distributed
from fpq_lightning.utils.files import shorten
from fpq_lightning.utils.places import check_ours, check_writable
from fpq_lightning.utils.progress import progress_bar
from fpq_lightning.utils.reading import read_json
from fpq_lightning.utils.values import MOST, Count, Within, check_values

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


STEPS_PER_BATCH = 10
"""Optimisation steps that Lightning sees as one batch; what it does around a batch takes longer than a short step."""


class UnitBatches:
    """Sample indices for the optimisation steps of one unit; those of step i are a function of (seed, unit, i) alone.

    Position j of a step draws from the samples of stratum j (see `Shard`). A batch holds the indices of up to
    `STEPS_PER_BATCH` steps, `[steps, batch_size]`.

    Args:
        seed: of the calibration.
        unit: position of the unit.
        n: samples to draw from.
        batch_size: indices a step, at most n.
        steps: number of steps; with 0 there is one batch without steps.
    """

    def __init__(self, seed: int, unit: int, n: int, batch_size: int, steps: int) -> None:
        self.seed, self.unit, self.steps = seed, unit, steps
        self.strata = np.arange(batch_size)
        self.stratum_sizes = -(-(n - self.strata) // batch_size)
        self.length = max(1, -(-steps // STEPS_PER_BATCH))
        self._next = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Tensor]:
        while self._next < self.length:
            first = self._next * STEPS_PER_BATCH
            self._next += 1
            steps = range(first, min(first + STEPS_PER_BATCH, self.steps))
            yield torch.stack([self.step(i) for i in steps]) if steps else torch.empty(0, 0)
        self._next = 0

    def step(self, i: int) -> Tensor:
        """Indices of step i, int64 `[batch_size]`."""
        draw = np.random.default_rng([self.seed % 2**64, self.unit, i])
        return torch.from_numpy(self.strata + len(self.strata) * draw.integers(self.stratum_sizes))

    def state_dict(self) -> dict[str, int]:
        """Where the loader is."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from there."""
        self._next = state["next"]


class HeldOutBatch:
    """A loader of one batch, so that every process validates, even one that holds none of the samples.

    Args:
        rows: indices of samples among those of this process, int64.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Tensor]:
        yield self.rows


class CalibrationDataModule(pl.LightningDataModule):
    """Samples what the denoisers see along the sampler's trajectories and serves it a unit at a time.

    Args:
        n_samples: size of the calibration set of each denoiser, over all its timesteps.
        seed: of its noise and of the order of batches.
        source: ``trajectories`` of the full-precision model, or the name or directory of a `datasets` dataset, or a
            parquet file, of real images that are noised to random timesteps.
        image_column: of the dataset of real images.
        timesteps: how often each timestep is kept: ``uniform``, ``late`` (towards the image) or ``early``.
        weighting: of the errors of samples: all alike, or by how much of an error of the denoiser's output the
            sampler lets through to the image at their timestep.
        held_out_fraction: share of the set that decides between learned and nearest rounding.
        n_search: samples that the search of formats and clips sees.
        micro_batch: samples a forward pass outside the optimisation.
        directory: where the set is kept as a `datasets` dataset, the sets of several denoisers in directories of
            their names; None leaves the choice to the run.
        store_budget: bytes of each compute device that captured activations may take, such as ``4GiB``.
        store_host_budget: bytes of host memory that they may take beyond, for each GPU; what is left goes to
            memory-mapped files.
        store_dtype: of captured activations.
        store_directory: where those files go; None leaves the choice to the run.
    """

    def __init__(
        self,
        n_samples: Annotated[int, Within(4, MOST)] = 1024,
        seed: int = 0,
        source: str = "trajectories",
        image_column: str = "image",
        timesteps: Literal["uniform", "late", "early"] = "uniform",
        weighting: Literal["uniform", "sensitivity"] = "sensitivity",
        held_out_fraction: float = 0.0625,
        n_search: Count = 64,
        micro_batch: Count = 64,
        directory: str | None = None,
        store_budget: str = "4GiB",
        store_host_budget: str = "16GiB",
        store_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        store_directory: str | None = None,
    ) -> None:
        super().__init__()
        self.n_samples = n_samples
        self.seed = seed
        self.source = source
        self.image_column = image_column
        self.timesteps = timesteps
        self.weighting = weighting
        self.held_out_fraction = held_out_fraction
        self.n_search = n_search
        self.micro_batch = micro_batch
        self.directory = directory
        self.store_budget, self.store_host_budget = store_budget, store_host_budget
        self.store_dtype = store_dtype
        self.store_directory = store_directory
        if type(n_samples) is int and n_samples < 4:
            raise ValueError(f"the calibration set would be empty: data.n_samples must be at least 4, got {n_samples}")
        check_values(self, "data")
        if not 0 < held_out_fraction < 1:
            raise ValueError(f"data.held_out_fraction must be between 0 and 1, got {held_out_fraction}")
        if round(n_samples * held_out_fraction) >= n_samples:
            raise ValueError(
                f"data.held_out_fraction {held_out_fraction} leaves none of {n_samples} samples to learn from"
            )
        parse_bytes(store_budget), parse_bytes(store_host_budget)
        self.sampler = SamplerConfig()
        self.placement: Placement
        self.plan = Plan()
        self._batch_size = 1
        self._required = True
        self._sets: dict[str, CalibrationSet] = {}
        self.key: CalibrationKey | None = None  # of a run
        self.sampling_seconds = 0.0

    def identity(self) -> dict[str, Any]:
        """What decides the result of a calibration: not where things are kept."""
        names = (
            "n_samples",
            "seed",
            "source",
            "image_column",
            "timesteps",
            "weighting",
            "held_out_fraction",
            "n_search",
        )
        return {name: getattr(self, name) for name in (*names, "store_dtype")}

    def check(self) -> None:
        """Looks at the dataset and the directories, so that a mistake is found before minutes are spent.

        Raises:
            FileNotFoundError: if there is no such dataset.
            ValueError: if it holds no images, a directory cannot be written, or something else is in the set's place.
        """
        if self.source != "trajectories":
            load_images(self.source, self.image_column)
        if self.directory is not None:
            check_ours(Path(self.directory), is_calibration_set, option="data.directory")
        for option in ("directory", "store_directory"):
            if (place := getattr(self, option)) is not None:
                check_writable(place, f"data.{option}")

    def attach(self, placement: Placement, batch_size: int, plan: Plan, required: bool) -> None:
        """Takes what the set is sampled with, and what is to be served.

        Args:
            placement: of the pipeline.
            batch_size: samples of one optimisation step, over all processes.
            plan: of the calibration.
            required: whether all denoisers must be called along a trajectory.
        """
        self.placement, self._batch_size, self.plan, self._required = placement, batch_size, plan, required

    # --- Lightning ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Makes the calibration sets, each process its part, unless they are there."""
        if self._sets:
            return
        if self.directory is not None and distributed.broadcast_from_rank0(is_calibration_set(Path(self.directory))):
            self._check_origin(Path(self.directory) / MADE_FROM)
            self._sets = self._load(self.directory)
            return
        start = time.perf_counter()
        self._sets = self.make_set()
        self.sampling_seconds = time.perf_counter() - start
        if self.directory is not None and distributed.rank() == 0:
            folders = {self._folders()[name]: found for name, found in self._sets.items()}
            save_calibration_sets(folders, self.directory, None if self.key is None else self.key.to_dict())

    def _folders(self) -> dict[str, str]:
        """Where the set of each denoiser lies in the directory: that of an only one is the directory itself."""
        names = list(self.placement.denoisers)
        return {name: name if len(names) > 1 else "" for name in names}

    def _load(self, directory: str) -> dict[str, CalibrationSet]:
        found = load_calibration_sets(directory, list(self._folders().values()))
        sets = {name: found[folder] for name, folder in self._folders().items() if folder in found}
        if len({len(one) for one in sets.values()}) > 1:
            raise ValueError(f"the calibration sets at {directory} are of several sizes: delete it to sample new ones")
        return sets

    def _check_origin(self, file: Path) -> None:
        """Refuses a set that says it was made from another model or with other options."""
        if self.key is None or not os.path.lexists(file):
            return
        made_from = read_json(file)
        if not isinstance(made_from, dict):
            raise ValueError(f"{file} is damaged: delete {file.parent} to sample the calibration set again")
        if changed := self.key.differences(made_from):
            raise ValueError(
                f"the calibration set at {file.parent} was made with other settings ({shorten(changed)}): choose "
                "another data.directory or delete it"
            )

    def train_dataloader(self) -> UnitBatches:
        """Batches of the unit in work."""
        return UnitBatches(self.seed, self.plan.unit, self.n_train, self.batch_size, self.plan.unit_steps)

    def val_dataloader(self) -> HeldOutBatch:
        """The held-out samples of this process."""
        samples = self.samples()
        return HeldOutBatch(samples.local(samples.held_out))

    # --- the set -----------------------------------------------------------------------------------------------

    def make_set(self) -> dict[str, CalibrationSet]:
        """Samples or noises the calibration set of each denoiser."""
        pipeline, denoisers = self.placement.pipeline, self.placement.denoisers
        self.placement.to(cast(Any, self.trainer).strategy.root_device)
        if self.source != "trajectories":
            noised = noise_real_images(pipeline, self.source, self.image_column, self.n_samples, self.seed)
            return dict.fromkeys(denoisers, noised)
        hidden = distributed.rank() > 0
        with progress_bar("sampling calibration set", unit="trajectory", disable=hidden) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return sample_calibration_sets(
                pipeline, denoisers, self.sampler, self.n_samples, self.seed, self.timesteps, self.weighting, show,
                on_plan=lambda text: logger.info("calibrating %s", text), required=self._required,
            )  # fmt: skip

    @property
    def sets(self) -> dict[str, CalibrationSet]:
        """The calibration set of each denoiser that is called, all of one size, once `setup` has run."""
        assert self._sets, "setup has not run"
        return self._sets

    @property
    def n(self) -> int:
        """Samples in each set."""
        return len(next(iter(self.sets.values())))

    @property
    def n_train(self) -> int:
        """Samples that are learned from; the rest is held out."""
        return self.n_train_of(self.n)

    def n_train_of(self, n: int) -> int:
        """The same for n samples."""
        return n - max(1, round(n * self.held_out_fraction))

    @property
    def batch_size(self) -> int:
        """Samples of one optimisation step, over all processes."""
        return min(self._batch_size, self.n_train)

    @property
    def shard(self) -> Shard:
        """The samples of this process."""
        return Shard(self.batch_size, distributed.rank(), distributed.world_size())

    def samples(self) -> Samples:
        """What the samples are for."""
        every = torch.arange(self.n)
        train, held_out = every[: self.n_train], every[self.n_train :]
        return Samples(self.n, train, held_out, train[: self.n_search], self.shard)

    def local_set(self, name: str) -> CalibrationSet:
        """The part of a denoiser's set that this process holds.

        Raises:
            ValueError: if several processes would share samples of several shapes.
        """
        found = self.sets[name]
        if distributed.world_size() > 1 and found.n_groups > 1:
            raise ValueError(
                "the calibration set holds samples of several shapes (of prompts of several lengths, say), which "
                "several processes cannot share: run on one device, or give prompts of one length"
            )
        return found.select(self.shard.owned(self.n))

    def make_store(self, device: torch.device) -> ActivationStore:
        """An empty activation store under the budgets."""
        return ActivationStore(
            device,
            _DTYPES[self.store_dtype],
            parse_bytes(self.store_budget),
            parse_bytes(self.store_host_budget),
            self.store_directory,
        )
