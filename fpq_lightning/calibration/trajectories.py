"""Calibration sets: what the denoiser is called with.

Either along the full-precision model's own sampling trajectories, or real images noised to random timesteps.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpq_lightning.pipelines import SamplerConfig, denoiser_name, sample, set_sampler
from fpq_lightning.storage.files import whole_directory, write_json

Inputs = dict[str, Any]
"""Keyword arguments of the denoiser: tensors with a leading dimension of samples, and constants."""

_WEIGHT = "sample_weight"
_CONSTANTS = "constants.safetensors"
MADE_FROM = "made_from.json"  # the model, sampler and options of a set


@dataclass
class CalibrationSet:
    """What the denoiser is called with.

    Attributes:
        inputs: keyword arguments of the denoiser.
        weights: how much an error on each sample matters, float32 `[n]`, mean 1.
    """

    inputs: Inputs
    weights: Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def batch(self, rows: slice | Tensor, device: torch.device) -> Inputs:
        """Keyword arguments of the denoiser for some of the samples."""

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return (value[rows] if value.ndim and len(value) == len(self) else value).to(device)

        return {name: place(value) for name, value in self.inputs.items()}


def _chunks(n: int, size: int) -> Iterator[range]:
    return (range(i, min(i + size, n)) for i in range(0, n, size))


def _per_sample(name: str, value: Any, batch: int) -> Any:
    """Gives the timestep, which pipelines pass as one number for the batch, a value for each sample."""
    if name == "timestep":
        value = torch.as_tensor(value)
        return value.expand(batch) if value.ndim == 0 else value
    return value


def timestep_weights(weighting: Literal["uniform", "late", "early"], steps: int) -> Tensor:
    """How often each step of a trajectory is kept, `[steps]`, summing to 1; step 0 is pure noise."""
    position = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    weights = {"uniform": torch.ones(steps), "late": 0.5 + position, "early": 1.5 - position}[weighting]
    return weights / weights.sum()


def steps_to_keep(n: int, steps: int, weighting: Literal["uniform", "late", "early"], seed: int) -> list[list[int]]:
    """Which steps of which trajectory make a calibration set of `n` samples.

    Every trajectory gives as many samples as there are steps, so that a uniform set holds every step equally often.

    Returns:
        For each trajectory the steps that are kept (a step may be kept more than once if weighted).
    """
    trajectories = -(-n // steps)
    if weighting == "uniform":
        kept = [list(range(steps)) for _ in range(trajectories)]
    else:
        generator = torch.Generator().manual_seed(seed)
        draws = torch.multinomial(
            timestep_weights(weighting, steps), trajectories * steps, replacement=True, generator=generator
        )
        kept = [sorted(row.tolist()) for row in draws.reshape(trajectories, steps)]
    surplus = trajectories * steps - n
    if surplus:
        stay = np.random.default_rng(seed).permutation(steps)[: steps - surplus]
        kept[-1] = [kept[-1][i] for i in sorted(stay)]
    return kept


def output_sensitivity(scheduler: Any, arguments: tuple, options: dict[str, Any]) -> Tensor:
    """How much of an error of the denoiser's output one scheduler step lets through to the sample, `[batch]`.

    A finite difference on a copy of the scheduler, so that any scheduler will do. Near the end of a trajectory the
    noise is so small that even a large relative error of its prediction changes the image little.
    """
    output, timestep, sample = arguments
    options = dict(options)
    takes_generator = "generator" in inspect.signature(type(scheduler).step).parameters
    probe = output.std() * 1e-2
    stepped = []
    for shift in (0.0, probe):
        clone = copy.copy(scheduler)
        clone.__dict__ = copy.deepcopy({k: v for k, v in vars(scheduler).items() if k != "step"})
        if takes_generator:  # the same noise in both steps, should the scheduler draw any
            options["generator"] = torch.Generator("cpu").manual_seed(0)
        stepped.append(clone.step(output + shift, timestep, sample, **options))
    before, after = (s[0] if isinstance(s, tuple) else s.prev_sample for s in stepped)
    return ((after - before).flatten(1).square().mean(1).sqrt() / probe).cpu()


@torch.no_grad()
def sample_trajectories(
    pipeline: DiffusionPipeline,
    sampler: SamplerConfig,
    n: int,
    seed: int = 0,
    timesteps: Literal["uniform", "late", "early"] = "uniform",
    weighting: Literal["uniform", "sensitivity"] = "uniform",
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> CalibrationSet:
    """Runs the pipeline and keeps what its denoiser is called with.

    Args:
        pipeline: in full precision.
        sampler: how to sample.
        n: samples to keep in all.
        seed: of the first trajectory's noise; the others count up from it.
        timesteps: how often each timestep is kept.
        weighting: weigh samples alike, or by the square of `output_sensitivity`.
        on_batch: called with the trajectories done and in all.

    Returns:
        The set, on the CPU.

    Raises:
        ValueError: if `n` is not positive or the trajectories hold NaN or Inf.
    """
    if n < 1:
        raise ValueError(f"the calibration set would be empty: ask for at least 1 sample, got {n}")
    set_sampler(pipeline, sampler)
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    signature = inspect.signature(type(denoiser).forward)
    keep = steps_to_keep(n, sampler.steps, timesteps, seed)
    collected: dict[str, list[Tensor]] = {}
    constants: Inputs = {}
    weights: list[Tensor] = []
    step = 0
    rows: list[int] = []
    batch: range = range(0)

    def record(module: Any, args: tuple, kwargs: dict) -> None:
        nonlocal step, rows
        bound = signature.bind(module, *args, **kwargs).arguments
        bound.pop("self")
        rows = [row for row, i in enumerate(batch) for _ in range(keep[i].count(step))]
        for name, value in bound.items():
            value = _per_sample(name, value, len(batch))
            if isinstance(value, Tensor) and value.ndim and len(value) == len(batch):
                collected.setdefault(name, []).append(value[torch.tensor(rows, dtype=torch.long)].cpu())
            else:
                constants[name] = value
        step += 1

    scheduler_step = pipeline.scheduler.step

    def measured_step(*args: Any, **kwargs: Any) -> Any:
        sensitivity = output_sensitivity(pipeline.scheduler, args, kwargs)
        weights.append(sensitivity.square()[torch.tensor(rows, dtype=torch.long)])
        return scheduler_step(*args, **kwargs)

    handle = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    if weighting == "sensitivity":
        pipeline.scheduler.step = measured_step
    try:
        for batch in _chunks(len(keep), sampler.batch_size):
            step = 0
            sample(pipeline, sampler, [seed + i for i in batch])
            on_batch(batch.stop, len(keep))
    finally:
        handle.remove()
        vars(pipeline.scheduler).pop("step", None)
    inputs: Inputs = {name: torch.cat(parts) for name, parts in collected.items()}
    if not inputs:
        raise ValueError(
            f"{type(pipeline).__name__} calls its denoiser with another batch than that of its images (guidance, or "
            "several views): such pipelines cannot be calibrated yet"
        )
    for name, value in {**inputs, "sensitivity": torch.cat(weights) if weights else torch.ones(1)}.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(
                f"the full-precision model gives NaN or Inf along its trajectories ({name}): it cannot be calibrated"
            )
    # Neighbours in the set come from other trajectories and steps, so that any part of it is representative.
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(next(iter(inputs.values())))))
    weight = torch.cat(weights)[order] if weights else torch.ones(len(order))
    inputs = {name: value[order] for name, value in inputs.items()}
    return CalibrationSet({**inputs, **constants}, weight / weight.mean())


@torch.no_grad()
def noise_real_images(pipeline: DiffusionPipeline, source: str, column: str, n: int, seed: int = 0) -> CalibrationSet:
    """Real images noised to timesteps drawn uniformly.

    Args:
        pipeline: an unconditional pixel-space pipeline; its scheduler adds the noise.
        source: a parquet file, or the name or directory of a `datasets` dataset.
        column: of the images.
        n: number of samples.
        seed: of the choice of images, timesteps and noise.

    Returns:
        The set, on the CPU, its samples weighted alike.

    Raises:
        ValueError: if the dataset is empty, lacks the column, or the pipeline is conditioned.
        FileNotFoundError: if there is no such dataset.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    if "prompt" in inspect.signature(pipeline.__call__).parameters or hasattr(pipeline, "vae"):
        raise ValueError(f"{type(pipeline).__name__} is conditioned or latent: calibrate it on trajectories")
    images = load_images(source, column)
    size = denoiser.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (n,), generator=generator).tolist()
    clean = torch.stack([image_tensor(images[i][column], height, width) for i in chosen])
    timestep = torch.randint(pipeline.scheduler.config.num_train_timesteps, (n,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    noised = pipeline.scheduler.add_noise(clean, noise, timestep)
    return CalibrationSet({"sample": noised, "timestep": timestep, "return_dict": False}, torch.ones(n))


def load_images(source: str, column: str) -> datasets.Dataset:
    """Opens a dataset of images: a parquet file, or the name or directory of a `datasets` dataset.

    Raises:
        ValueError: if it is empty or lacks the column.
        FileNotFoundError: if it is not there.
    """
    try:
        if source.endswith(".parquet"):
            dataset = datasets.load_dataset("parquet", data_files=source, split="train")
        elif (Path(source) / "dataset_info.json").is_file():
            dataset = datasets.load_from_disk(source)
        else:
            dataset = datasets.load_dataset(source, split="train")
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(f"there is no dataset of images {source}: {str(error).splitlines()[0]}") from error
    if column not in dataset.column_names:
        raise ValueError(f"{source} has no column {column!r}; it has {', '.join(dataset.column_names)}")
    if not len(dataset):
        raise ValueError(f"{source} holds no images")
    return dataset


def image_tensor(image: Any, height: int, width: int) -> Tensor:
    """A PIL image as `[3, height, width]`, float32 in [-1, 1]."""
    resized = image.convert("RGB")
    if resized.size != (width, height):
        resized = resized.resize((width, height))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div_(127.5).sub_(1)


def save_calibration_set(
    calibration: CalibrationSet, directory: str | Path, made_from: Mapping[str, Any] | None = None
) -> None:
    """Writes a calibration set as a `datasets` dataset (Arrow), a column for each tensor.

    Constants are kept in its description as JSON, and beside it as safetensors.
    """
    tensors = {k: v for k, v in calibration.inputs.items() if isinstance(v, Tensor)}
    columns = {k: v for k, v in tensors.items() if v.ndim and len(v) == len(calibration)}
    constants = {k: v for k, v in calibration.inputs.items() if k not in tensors}
    columns[_WEIGHT] = calibration.weights
    features = datasets.Features({name: _feature(value) for name, value in columns.items()})
    info = datasets.DatasetInfo(description=json.dumps(constants), features=features)
    dataset = datasets.Dataset.from_dict({k: v.numpy() for k, v in columns.items()}, features=features, info=info)
    with whole_directory(Path(directory)) as temporary:
        dataset.save_to_disk(str(temporary))
        save_file({k: v.contiguous() for k, v in tensors.items() if k not in columns}, temporary / _CONSTANTS)
        if made_from is not None:
            write_json(temporary / MADE_FROM, made_from)


def _feature(value: Tensor) -> Any:
    dtype = str(value.dtype).removeprefix("torch.")
    shape: Sequence[int] = value.shape[1:]
    if not shape:
        return datasets.Value(dtype)
    if len(shape) == 1:
        return datasets.Sequence(datasets.Value(dtype), length=shape[0])
    return getattr(datasets, f"Array{len(shape)}D")(shape=tuple(shape), dtype=dtype)


def load_calibration_set(directory: str | Path) -> CalibrationSet:
    """Reads what `save_calibration_set` wrote.

    Raises:
        FileNotFoundError: if there is no dataset.
        ValueError: if it is empty or damaged.
    """
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"there is no calibration set at {directory}")
    try:
        dataset = datasets.load_from_disk(str(directory))
        table = dataset.with_format("numpy")
        columns: Inputs = {name: torch.from_numpy(np.array(table[name][:])) for name in dataset.column_names}
        constants = json.loads(dataset.info.description or "{}")
        constants |= load_file(Path(directory) / _CONSTANTS)
        weights = columns.pop(_WEIGHT)
    except Exception as error:  # whatever a damaged Arrow file raises
        raise ValueError(f"the calibration set at {directory} cannot be read ({error}): delete it") from error
    if not len(weights):
        raise ValueError(f"the calibration set at {directory} is empty: delete it to sample a new one")
    return CalibrationSet({**columns, **constants}, weights)
