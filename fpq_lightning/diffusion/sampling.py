"""Sampling images: image i is a function of seed i alone, whatever the batch and the device."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers import schedulers as diffusers_schedulers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fpq_lightning.diffusion.prompts import load_prompts
from fpq_lightning.nn.calibrated import Mode, running


@dataclass
class SamplerConfig:
    """How images are sampled, both for calibration and for evaluation.

    Making one reads no file; `check` does.

    Attributes:
        scheduler: class name of a diffusers scheduler, which takes over the configuration of the pipeline's own one;
            null keeps the pipeline's scheduler.
        steps: number of inference steps.
        guidance_scale: scale of classifier-free guidance; null is the pipeline's default.
        prompts: prompts for a text-to-image pipeline: a list, a file (.txt, .csv, .tsv, .parquet) or a `datasets`
            dataset. Seed i takes prompt i, starting over after the last prompt.
        prompt_column: column of that file or dataset; null takes ``prompt``, ``caption`` or ``text``.
        negative_prompt: negative prompt for all images.
        height: image height; null is the pipeline's default.
        width: image width; null is the pipeline's default.
        batch_size: images that are sampled at once.
    """

    scheduler: str | None = "DDIMScheduler"
    steps: int = 25
    guidance_scale: float | None = None
    prompts: str | list[str] | None = None
    prompt_column: str | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"sampling needs steps and batch_size of at least 1, got {self}")
        if self.scheduler is not None and not hasattr(diffusers_schedulers, self.scheduler):
            raise ValueError(f"diffusers has no scheduler {self.scheduler!r}: use for example DDIMScheduler")

    def check(self) -> None:
        """Reads the prompts, so that a mistake is found before minutes are spent.

        Raises:
            FileNotFoundError: if there is no such file or dataset.
            ValueError: if a prompt is empty, or there are none.
        """
        if self.prompts is not None:
            load_prompts(self.prompts, self.prompt_column)

    def prompts_of(self, seeds: Sequence[int]) -> list[str] | None:
        """The prompt of each seed; None if there are no prompts."""
        if self.prompts is None:
            return None
        prompts = load_prompts(self.prompts, self.prompt_column)
        return [prompts[seed % len(prompts)] for seed in seeds]

    def identity(self) -> dict[str, Any]:
        """What decides the image of a seed: all options but the batch size, and a hash of the prompts' text."""
        values = {k: v for k, v in asdict(self).items() if k not in ("batch_size", "prompt_column")}
        if self.prompts is not None:
            text = "\0".join(load_prompts(self.prompts, self.prompt_column))
            values["prompts"] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return values


def set_sampler(pipeline: DiffusionPipeline, sampler: SamplerConfig) -> None:
    """Gives the pipeline the sampler's scheduler, with the configuration of its own one.

    Raises:
        ValueError: if that configuration is of another kind of diffusion, such as flow matching.
    """
    if sampler.scheduler is not None:
        scheduler_class: type[SchedulerMixin] = getattr(diffusers_schedulers, sampler.scheduler)
        own = pipeline.scheduler
        if type(own) is not scheduler_class:
            if scheduler_class not in own.compatibles:
                raise ValueError(
                    f"sampler.scheduler {sampler.scheduler} does not fit the pipeline's {type(own).__name__}: use "
                    "--sampler.scheduler null for its own, or one that is compatible with it"
                )
            pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)


def warn_of_long_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> None:
    """Warns if prompts are longer than every tokenizer of the pipeline allows: text encoders do not see their ends."""
    tokenizers = [c for c in pipeline.components.values() if isinstance(c, PreTrainedTokenizerBase)]
    if not tokenizers or not prompts:
        return
    different = list(dict.fromkeys(prompts))
    lengths = [[len(ids) for ids in t(different, verbose=False)["input_ids"]] for t in tokenizers]
    limits = [t.model_max_length for t in tokenizers]
    too_long = [
        prompt
        for prompt, counts in zip(different, zip(*lengths, strict=True), strict=True)
        if all(count > limit for count, limit in zip(counts, limits, strict=True))
    ]
    if too_long:
        warnings.warn(
            f"{len(too_long)} of {len(different)} prompts have more than the {max(limits)} tokens that the text "
            f"encoder takes and are cut off, the first one {too_long[0][:40]!r}...",
            stacklevel=2,
        )


def batches_of(seeds: range, size: int, world_size: int = 1) -> Iterator[range]:
    """Cuts seeds into batches; they are smaller than `size` if a process would otherwise get no batch."""
    size = min(size, max(1, len(seeds) // world_size))
    return (seeds[i : i + size] for i in range(0, len(seeds), size))


@contextmanager
def using_sampler(pipeline: DiffusionPipeline, sampler: SamplerConfig) -> Iterator[None]:
    """Within the block the pipeline has the sampler's scheduler."""
    own = pipeline.scheduler
    set_sampler(pipeline, sampler)
    try:
        yield
    finally:
        pipeline.scheduler = own


@contextmanager
def running_pipeline(pipeline: DiffusionPipeline, mode: Mode) -> Iterator[None]:
    """Within the block all quantized layers of a pipeline's components run in `mode`."""
    with ExitStack() as stack:
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                stack.enter_context(running(component, mode))
        yield


@torch.no_grad()
def sample(
    pipeline: DiffusionPipeline, sampler: SamplerConfig, seeds: Sequence[int], prompts: Sequence[str] | None = None
) -> Tensor:
    """Samples one image for each seed.

    Image i starts from ``torch.Generator("cpu").manual_seed(seeds[i])``, whatever the batch and the device.

    Args:
        pipeline: with the sampler's scheduler, see `using_sampler`.
        sampler: steps, guidance, size and prompts.
        seeds: a seed for each image.
        prompts: a prompt for each image; None takes those of the sampler.

    Returns:
        `[n, channels, height, width]`, float32 in [-1, 1], on the CPU.

    Raises:
        ValueError: if an option does not fit the pipeline, or prompts are missing.
    """
    accepted = inspect.signature(pipeline.__call__).parameters
    arguments: dict[str, Any] = {
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        "num_inference_steps": sampler.steps,
        "output_type": "np",
    }
    chosen = ("guidance_scale", "negative_prompt", "height", "width")
    for name in (name for name in chosen if getattr(sampler, name) is not None):
        if name not in accepted:
            raise ValueError(f"{type(pipeline).__name__} has no {name}: leave sampler.{name} out")
        value = getattr(sampler, name)
        arguments[name] = [value] * len(seeds) if name == "negative_prompt" else value
    prompts = sampler.prompts_of(seeds) if prompts is None else prompts
    if "prompt" in accepted:
        if prompts is None:
            raise ValueError(f"{type(pipeline).__name__} is conditioned on text: give prompts with --sampler.prompts")
        arguments["prompt"] = list(prompts)
    else:
        if prompts is not None:
            raise ValueError(f"{type(pipeline).__name__} is not conditioned on text: leave the prompts out")
        arguments["batch_size"] = len(seeds)
    try:
        images = pipeline(**arguments).images
    except TypeError as error:
        if "BFloat16" not in str(error):
            raise
        kind = type(pipeline).__name__
        raise ValueError(f"{kind} cannot make images of a bfloat16 model: load it in float32") from error
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().mul_(2).sub_(1)
