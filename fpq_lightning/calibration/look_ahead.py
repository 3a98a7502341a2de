"""What the trajectories of a pipeline are, from the first steps of a few images."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fpq_lightning.calibration.axes import Axis, collapsed, find_axes
from fpq_lightning.calibration.one_image import find_axes_of_one
from fpq_lightning.calibration.recorder import Call, Recorder
from fpq_lightning.diffusion.sampling import (
    FunctionSampler,
    SamplerConfig,
    bare,
    generate,
    using_sampler,
    warn_of_long_prompts,
)
from fpq_lightning.utils import distributed


@dataclass(frozen=True)
class Plan:
    """What is known of a denoiser before sampling.

    Attributes:
        network: its class, and its name if it is not the only one.
        axes: where images lie in its arguments.
        structure: of the first call's arguments, with the path of each leaf in its place.
        calls: of a trajectory, as the schedulers say.
        alone: whether images are sampled one by one.
    """

    network: str
    axes: dict[str, Axis]
    structure: Any
    calls: int
    alone: bool


class _Enough(Exception):  # noqa: N818
    """Ends sampling once all is known that was asked for."""


@dataclass
class _Ahead:
    """What the beginning of a trajectory says of a denoiser.

    Attributes:
        first: its calls in the first step in which it is called.
        scheduler: that makes this step.
        calls: of the whole trajectory, if it goes on as it began.
    """

    first: list[Call]
    scheduler: Any
    calls: int = 0


def _begin(
    pipeline: DiffusionPipeline,
    denoisers: Mapping[str, nn.Module],
    sampler: SamplerConfig,
    seeds: Sequence[int],
    prompts: list[str] | None,
) -> dict[str, _Ahead]:
    """Samples until every denoiser has been called, or to the end; all images have one prompt."""
    found: dict[str, _Ahead] = {}
    steps: Counter[int] = Counter()

    def on_step(calls: dict[str, list[Call]], scheduler: Any) -> None:
        scheduler = getattr(pipeline, "scheduler", None) if scheduler is None else scheduler
        steps[id(scheduler)] += 1
        left = _steps_of(scheduler, sampler) - steps[id(scheduler)]
        for name, some in calls.items():
            found.setdefault(name, _Ahead(some, scheduler)).calls += len(some)
        if len(found) == len(denoisers):
            for name, some in calls.items():
                found[name].calls += max(0, left) * len(some)
            raise _Enough

    alike = None if prompts is None else prompts[:1] * len(seeds)
    with suppress(_Enough), Recorder(pipeline, denoisers, on_step):
        generate(pipeline, sampler, seeds, alike)
    return found


def _begin_and_axes(
    pipeline: DiffusionPipeline,
    denoisers: Mapping[str, nn.Module],
    sampler: SamplerConfig,
    seed: int,
    prompts: list[str] | None,
) -> tuple[dict[str, _Ahead], dict[str, dict[str, Axis]]]:
    """How a batch begins, and where images lie in the arguments of each denoiser, as one image more shows.

    Raises:
        ValueError: if the pipeline makes one image in a call, and batches are larger.
    """
    images = min(2, sampler.batch_size)
    more = range(seed, seed + images + 1)
    failure: Exception | None = None
    try:
        small = _begin(pipeline, denoisers, sampler, more[:-1], prompts)
        for several, seeds in ((sampler, more), *(_of_one(pipeline, sampler, more) if images == 1 else ())):
            try:
                large = _begin(pipeline, denoisers, several, seeds, prompts)
                networks = _networks({name: denoisers[name] for name in small})
                return small, {
                    name: _axes(network, small[name], large.get(name), pipeline, images)
                    for name, network in networks.items()
                }
            except Exception as error:  # whatever a pipeline may do with more images than it takes
                failure = failure or error
        if images == 1:
            with suppress(ValueError):
                other = _begin(pipeline, denoisers, sampler, more[1:], prompts)
                return small, {
                    name: find_axes_of_one(denoisers[name], ahead.first, other[name].first)
                    for name, ahead in small.items()
                }
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        failure = failure or error
    if images > 1:
        with suppress(Exception):
            _begin_and_axes(pipeline, denoisers, replace(sampler, batch_size=1), seed, prompts)
            kind, reason = type(pipeline).__name__, " ".join(str(failure).split())[:200]
            line = f"{kind} does not make {images} images in a call ({reason}): set sampler.batch_size 1"
            failure = ValueError(line)
    assert failure is not None
    raise failure


def _of_one(
    pipeline: DiffusionPipeline, sampler: SamplerConfig, seeds: Sequence[int]
) -> Iterator[tuple[SamplerConfig, Sequence[int]]]:
    """Samplers of several images that have the first one's prompt or inputs, and the seeds to call them with."""
    if isinstance(sampler, FunctionSampler):
        return
    accepted = inspect.signature(pipeline.__call__).parameters
    generators = [torch.Generator("cpu").manual_seed(seed % 2**64) for seed in seeds]
    for name in accepted:
        if name.endswith("_per_prompt"):
            given = {**sampler.arguments, name: len(seeds), "generator": generators}
            yield replace(sampler, arguments=given), seeds[:1]
    shared = {name: bare(values, accepted[name]) for name, values in sampler.inputs_of(seeds[:1]).items()}
    yield replace(sampler, inputs=None, arguments={**sampler.arguments, **shared}), seeds


def look_ahead(
    pipeline: DiffusionPipeline,
    denoisers: Mapping[str, nn.Module],
    sampler: SamplerConfig,
    seed: int,
    n: int,
    on_plan: Callable[[str], None],
    required: bool,
) -> dict[str, Plan]:
    """Calls the pipeline for the first steps of some images, and says what will be calibrated."""
    small, axes = _begin_and_axes(pipeline, denoisers, sampler, seed, sampler.prompts_of([seed]))
    if never := [name for name in denoisers if name not in small]:
        text = f"{type(pipeline).__name__} never calls its {', '.join(never)} along a trajectory of this sampler"
        if required or not small:
            raise ValueError(f"{text}: leave it out of recipe.denoisers, or sample otherwise")
        if distributed.rank() == 0:
            warnings.warn(f"{text}: it stays in full precision", stacklevel=3)
    denoisers = {name: module for name, module in denoisers.items() if name in small}
    networks = _networks(denoisers)
    prompts = sampler.prompts_of(range(seed, seed + max(-(-n // ahead.calls) for ahead in small.values()))) or []
    if distributed.rank() == 0:
        for name in denoisers:
            on_plan(f"{networks[name]} with {n} samples along {_described(small[name], sampler)}")
        warn_of_long_prompts(pipeline, prompts)
    alone = sampler.batch_size > 1 and _lengths_differ(pipeline, denoisers, sampler, seed, prompts, axes)
    return {
        name: Plan(
            networks[name], axes[name], collapsed(small[name].first[0].arguments, axes[name])[0],
            small[name].calls, alone,
        )
        for name in denoisers
    }  # fmt: skip


def _networks(denoisers: Mapping[str, nn.Module]) -> dict[str, str]:
    """The classes of denoisers by name, with their names if there are several."""
    kinds = {name: type(module).__name__ for name, module in denoisers.items()}
    return kinds if len(kinds) == 1 else {name: f"{name} ({kind})" for name, kind in kinds.items()}


def _axes(
    network: str, small: _Ahead, large: _Ahead | None, pipeline: DiffusionPipeline, images: int
) -> dict[str, Axis]:
    """Where images lie in the arguments of a denoiser."""
    n_large = 0 if large is None else len(large.first)
    if large is None or len(small.first) != n_large:
        raise ValueError(
            f"{type(pipeline).__name__} calls {network} {len(small.first)} times in the first step of {images} images "
            f"and {n_large} times in that of {images + 1}: such pipelines cannot be calibrated"
        )
    axes: dict[str, Axis] = {}
    for a, b in zip(small.first, large.first, strict=True):
        axes = find_axes(network, a.arguments, b.arguments, images) | axes
    if not axes:
        raise ValueError(
            f"{network} is called with nothing that grows with the images: a pipeline or function that is asked for "
            "several images must make them in one batch"
        )
    return axes


def count_calls(
    pipeline: DiffusionPipeline, denoisers: Mapping[str, nn.Module], sampler: SamplerConfig
) -> dict[str, int]:
    """How often each denoiser is called for an image, by what the schedulers say; samples the beginning of one image.

    One that is never called is left out.
    """
    with torch.no_grad(), using_sampler(pipeline, sampler):
        found = _begin(pipeline, denoisers, sampler, [0], sampler.prompts_of([0]))
        return {name: ahead.calls for name, ahead in found.items()}


def _steps_of(scheduler: Any, sampler: SamplerConfig) -> int:
    """Steps of a trajectory that has begun."""
    timesteps = getattr(scheduler, "timesteps", None)
    return sampler.steps or 1 if timesteps is None or not len(timesteps) else len(timesteps)


def _described(ahead: _Ahead, sampler: SamplerConfig) -> str:
    """What is sampled, in words."""
    timesteps = getattr(ahead.scheduler, "timesteps", None)
    span = "" if timesteps is None or not len(timesteps) else f", timesteps {timesteps[0]:.4g} to {timesteps[-1]:.4g}"
    guidance = "guidance of the pipeline" if sampler.guidance_scale is None else f"guidance {sampler.guidance_scale:g}"
    return f"{type(ahead.scheduler).__name__}: {ahead.calls} calls a trajectory{span}, {guidance}"


def _lengths_differ(
    pipeline: DiffusionPipeline,
    denoisers: Mapping[str, nn.Module],
    sampler: SamplerConfig,
    seed: int,
    prompts: list[str],
    axes: Mapping[str, Mapping[str, Axis]],
) -> bool:
    """Whether the length of a prompt shows in the shape of an argument: a batch would pad it to its longest."""
    if len(set(prompts)) < 2:
        return False
    shapes = []
    for prompt in (min(prompts, key=len), max(prompts, key=len)):
        begun = _begin(pipeline, denoisers, sampler, [seed], [prompt])
        leaves = {name: collapsed(ahead.first[0].arguments, axes[name])[1] for name, ahead in begun.items()}
        shapes.append(tree_map(lambda leaf: leaf.shape if isinstance(leaf, Tensor) else None, leaves))
    return shapes[0] != shapes[1]
