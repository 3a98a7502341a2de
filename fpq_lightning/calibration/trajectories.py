"""Calibration sets: what the denoiser is called with.

Either along the full-precision model's own sampling trajectories, or real images noised to random timesteps.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpq_lightning.diffusion.images import image_tensor, load_images
from fpq_lightning.diffusion.pipelines import SamplerConfig, batches_of, denoiser_name, sample, using_sampler
from fpq_lightning.graph.tree import flatten, nest, output_leaves
from fpq_lightning.utils import distributed
from fpq_lightning.utils.files import atomic_directory, write_json

_WEIGHT = "sample_weight"
_CONSTANTS = "constants.safetensors"
_BFLOAT16 = "_bfloat16"  # names of columns, among the constants
MADE_FROM = "made_from.json"  # the model, sampler and options of a set


@dataclass
class CalibrationSet:
    """What the denoiser is called with.

    Attributes:
        inputs: keyword arguments of the denoiser that differ from sample to sample, `[n, ...]`; those within others
            by path, such as ``added_cond_kwargs/time_ids``.
        weights: how much an error on each sample matters, float32 `[n]`, mean 1.
        constants: the other keyword arguments, by path.
    """

    inputs: dict[str, Tensor]
    weights: Tensor
    constants: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.weights)

    def batch(self, rows: slice | Tensor, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the denoiser for some of the samples."""
        inputs = {name: value[rows].to(device) for name, value in self.inputs.items()}
        constants = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.constants.items()}
        return nest({**inputs, **constants})

    def select(self, rows: Tensor) -> CalibrationSet:
        """Some of the samples as a set."""
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        return CalibrationSet(inputs, self.weights[rows], self.constants)


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
    output, sample = output.float(), sample.float()  # half precision loses the difference
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

    The processes of a distributed run take a part of the trajectories each, and all get the whole set.

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
    keep = steps_to_keep(n, sampler.steps, timesteps, seed)
    batches = list(batches_of(range(len(keep)), sampler.batch_size, distributed.world_size()))
    mine = range(distributed.rank(), len(batches), distributed.world_size())
    with using_sampler(pipeline, sampler), _Recorder(pipeline, keep, weighting) as recorder:
        for i in mine:
            recorder.begin(batches[i])
            sample(pipeline, sampler, [seed + trajectory for trajectory in batches[i]])
            on_batch(batches[i].stop, len(keep))
    parts = sorted(
        (part for parts in distributed.all_gather_objects(recorder.parts) for part in parts), key=lambda part: part[0]
    )
    inputs = {name: torch.cat([part[name] for _, part in parts]) for name in parts[0][1]}
    weight = inputs.pop(_WEIGHT, None)
    if not inputs:
        raise ValueError(
            f"{type(pipeline).__name__} does not call its denoiser before the steps of its scheduler: such pipelines "
            "cannot be calibrated"
        )
    if weight is None:
        weight = torch.ones(n)
    for name, value in {**inputs, "sensitivity": weight}.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(
                f"the full-precision model gives NaN or Inf along its trajectories ({name}): it cannot be calibrated"
            )
    # Neighbours in the set come from other trajectories and steps, so that any part of it is representative.
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(weight)))
    inputs = {name: value[order] for name, value in inputs.items()}
    constants = distributed.broadcast_from_rank0(recorder.constants)
    return CalibrationSet(inputs, (weight / weight.mean())[order], constants)


@dataclass
class _Call:
    """One call of the denoiser: its arguments by path, how many passes lie in its batch, and its output."""

    arguments: dict[str, Any]
    passes: int
    output: Tensor


class _Recorder:
    """Keeps what a pipeline's denoiser is called with while it samples.

    With guidance there are several passes a step, one after the other in one batch, or in calls of their own. Each
    trajectory and step gives one sample, of each pass in turn.
    """

    def __init__(self, pipeline: DiffusionPipeline, keep: list[list[int]], weighting: str) -> None:
        self.scheduler = pipeline.scheduler
        self.denoiser = getattr(pipeline, denoiser_name(pipeline))
        self.signature = inspect.signature(type(self.denoiser).forward)
        self.keep = keep
        self.weighting = weighting
        self.parts: list[tuple[int, dict[str, Tensor]]] = []  # by the first trajectory of each batch
        self.constants: dict[str, Any] = {}
        self._batch = range(0)
        self._collected: dict[str, list[Tensor]] = {}
        self._calls: list[_Call] = []  # of this step
        self._step = 0

    def begin(self, batch: range) -> None:
        """Goes to the next trajectories."""
        self._finish()
        self._batch, self._step, self._collected, self._calls = batch, 0, {}, []

    def _finish(self) -> None:
        if len(self._batch):
            part = {name: torch.cat(values) for name, values in self._collected.items()}
            self.parts.append((self._batch.start, part))

    def __enter__(self) -> _Recorder:
        self._handle = self.denoiser.register_forward_hook(self._record, with_kwargs=True)
        self._scheduler_step = self.scheduler.step
        self.scheduler.step = self._measured_step
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()
        vars(self.scheduler).pop("step", None)
        self._finish()

    def _record(self, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        bound = dict(self.signature.bind(module, *args, **kwargs).arguments)
        bound.pop("self")
        first = next((value for value in bound.values() if isinstance(value, Tensor) and value.ndim > 1), None)
        n = len(self._batch)
        if first is None or len(first) % n:
            size = 0 if first is None else len(first)
            raise ValueError(
                f"{type(module).__name__} is called with a batch of {size} for {n} images: such pipelines cannot be "
                "calibrated"
            )
        arguments = {
            path: _per_sample(path, value, len(first))
            for name, value in bound.items()
            for path, value in flatten(name, value)
        }
        self._calls.append(_Call(arguments, len(first) // n, output_leaves(output)[0].detach()))

    def _measured_step(self, *args: Any, **kwargs: Any) -> Any:
        self._collect(args, kwargs)
        self._calls = []
        self._step += 1
        return self._scheduler_step(*args, **kwargs)

    def _collect(self, args: tuple, kwargs: dict[str, Any]) -> None:
        n = len(self._batch)
        outputs = [output for call in self._calls for output in call.output.chunk(call.passes)]
        kept = [row for row, t in enumerate(self._batch) for _ in range(self.keep[t].count(self._step))]
        if not outputs or not kept:
            return
        chosen = [(self._batch[row] + self._step) % len(outputs) for row in kept]
        # The passes of a step lie one after the other, whether in one call or in several.
        rows = torch.tensor([p * n + row for row, p in zip(kept, chosen, strict=True)])
        for path, value in self._calls[0].arguments.items():
            values = [call.arguments[path] for call in self._calls]
            if all(_is_batched(v, call.passes * n) for v, call in zip(values, self._calls, strict=True)):
                every = values[0] if len(values) == 1 else torch.cat(values)
                self._collected.setdefault(path, []).append(every[rows.to(every.device)].cpu())
            else:
                self.constants[path] = value.cpu() if isinstance(value, Tensor) else value
        if self.weighting == "sensitivity":
            shares = guidance_shares(outputs, args[0])
            sensitivity = output_sensitivity(self.scheduler, args, kwargs)
            self._collected.setdefault(_WEIGHT, []).append((sensitivity[kept] * shares[chosen]).square())


def _is_batched(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == n


def guidance_shares(outputs: Sequence[Tensor], combined: Tensor) -> Tensor:
    """How much of each pass goes into what the scheduler is given, `[passes]`, absolute values.

    Classifier-free guidance adds the passes up with weights 1 - g and g. They are found by least squares, so that no
    pipeline's way of guiding need be known.

    Args:
        outputs: of the denoiser for each pass, `[n, channels, ...]`.
        combined: what they were combined to; has the first of the channels, where the rest predicts a variance.
    """
    if len(outputs) == 1:
        return torch.ones(1)
    columns = torch.stack([x[:, : combined.shape[1]].flatten().double().cpu() for x in outputs], dim=1)
    if columns.shape[0] != combined.numel():
        return torch.ones(len(outputs))
    gram = columns.T @ columns
    return (torch.linalg.pinv(gram) @ columns.T @ combined.flatten().double().cpu()).abs().float()


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
    noised = noised.to(denoiser.dtype)
    return CalibrationSet({"sample": noised, "timestep": timestep}, torch.ones(n), {"return_dict": False})


def save_calibration_set(
    calibration: CalibrationSet, directory: str | Path, made_from: Mapping[str, Any] | None = None
) -> None:
    """Writes a calibration set as a `datasets` dataset (Arrow), a column for each tensor.

    Constants are kept in its description as JSON, and beside it as safetensors.
    """
    tensors = {k: v.contiguous() for k, v in calibration.constants.items() if isinstance(v, Tensor)}
    constants = {k: v for k, v in calibration.constants.items() if k not in tensors}
    columns = {**calibration.inputs, _WEIGHT: calibration.weights}
    constants[_BFLOAT16] = [name for name, value in columns.items() if value.dtype == torch.bfloat16]
    columns |= {name: columns[name].view(torch.int16) for name in constants[_BFLOAT16]}  # which numpy lacks
    features = datasets.Features({name: _feature(value) for name, value in columns.items()})
    info = datasets.DatasetInfo(description=json.dumps(constants), features=features)
    dataset = datasets.Dataset.from_dict({k: v.numpy() for k, v in columns.items()}, features=features, info=info)
    with atomic_directory(Path(directory)) as temporary:
        dataset.save_to_disk(str(temporary))
        save_file(tensors, temporary / _CONSTANTS)
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
        columns = {name: torch.from_numpy(np.array(table[name][:])) for name in dataset.column_names}
        constants = json.loads(dataset.info.description or "{}")
        columns |= {name: columns[name].short().view(torch.bfloat16) for name in constants.pop(_BFLOAT16, ())}
        constants |= load_file(Path(directory) / _CONSTANTS)
        weights = columns.pop(_WEIGHT)
    except Exception as error:  # whatever a damaged Arrow file raises
        raise ValueError(f"the calibration set at {directory} cannot be read ({error}): delete it") from error
    if not len(weights):
        raise ValueError(f"the calibration set at {directory} is empty: delete it to sample a new one")
    return CalibrationSet(columns, weights, constants)
