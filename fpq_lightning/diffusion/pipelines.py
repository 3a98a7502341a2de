"""diffusers pipelines: loading, the denoiser, and sampling that is a function of the image index."""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers import schedulers as diffusers_schedulers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fpq_lightning.diffusion.prompts import load_prompts
from fpq_lightning.nn.calibrated import Mode, running

DENOISERS = ("transformer", "unet")


@dataclass
class SamplerConfig:
    """How images are sampled, in calibration and evaluation alike.

    Attributes:
        scheduler: class name of the diffusers scheduler, made from the configuration of the pipeline's own; None
            keeps the pipeline's own.
        steps: number of inference steps.
        guidance_scale: of classifier-free guidance, where the pipeline has one.
        prompts: of pipelines that take some: a list, a file (.txt, .csv, .tsv, .parquet) or a `datasets` dataset. Seed
            i takes prompt i, beginning again after the last.
        prompt_column: of that file or dataset; null takes ``prompt``, ``caption`` or ``text``.
        negative_prompt: for all images.
        height: of the images; null is the pipeline's default.
        width: likewise.
        batch_size: images at a time.
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
        # The name of a dataset may mean a download, which is not for options that are only looked at.
        if self.prompts is not None and (not isinstance(self.prompts, str) or Path(self.prompts).suffix):
            load_prompts(self.prompts, self.prompt_column)

    def prompts_of(self, seeds: Sequence[int]) -> list[str] | None:
        """The prompt of each seed, None without any."""
        if self.prompts is None:
            return None
        prompts = load_prompts(self.prompts, self.prompt_column)
        return [prompts[seed % len(prompts)] for seed in seeds]

    def identity(self) -> dict[str, Any]:
        """What decides an image, given its seed: not how many are sampled at a time or where prompts are kept."""
        values = {k: v for k, v in asdict(self).items() if k not in ("batch_size", "prompt_column")}
        if self.prompts is not None:
            text = "\0".join(load_prompts(self.prompts, self.prompt_column))
            values["prompts"] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return values


def load_pipeline(model: str | Path, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Loads a pipeline from a directory or the hub.

    Raises:
        FileNotFoundError: if `model` looks like a path and there is no pipeline.
        ValueError: if it cannot be loaded.
    """
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "model_index.json").is_file():
            raise FileNotFoundError(f"{path} has no model_index.json: {_instead_of(path)}")
    elif str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"there is no model at {path}: give a pipeline directory or a hub id such as owner/name"
        )
    try:
        pipeline = DiffusionPipeline.from_pretrained(str(path) if path.exists() else str(model), dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError) as error:
        if not path.exists():
            raise ValueError(f"there is no directory {model}, and no pipeline of that name on the hub") from error
        reason = " ".join(str(error).split())[:300]
        if method := _foreign_method(path):
            reason = f"its denoiser is stored for readers of {method}, which diffusers cannot be here ({reason})"
        raise ValueError(f"cannot load the pipeline {model}: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _instead_of(path: Path) -> str:
    """What to give instead of a directory that holds no pipeline."""
    if (path / "quantized" / "model_index.json").is_file():
        return f"give {path / 'quantized'}"
    part = "it is a single model, " if (path / "config.json").is_file() else ""
    return f"{part}give the directory of a diffusers pipeline"


def quantization_of(path: Path) -> tuple[Path, str] | None:
    """The configuration file of a pipeline's quantized denoiser and the method that it names, if there is one."""
    for name in DENOISERS:
        file = path / name / "config.json"
        try:
            return file, str(json.loads(file.read_text())["quantization_config"]["quant_method"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _foreign_method(path: Path) -> str | None:
    found = quantization_of(path)
    return None if found is None or found[1] == "fpq" else found[1]


def denoiser_name(pipeline: DiffusionPipeline) -> str:
    """The name of the pipeline's denoiser, ``transformer`` or ``unet``.

    Raises:
        ValueError: if it has none.
    """
    for name in DENOISERS:
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise ValueError(f"{type(pipeline).__name__} has no denoiser: expected a component named {' or '.join(DENOISERS)}")


def set_sampler(pipeline: DiffusionPipeline, sampler: SamplerConfig) -> None:
    """Gives the pipeline the sampler's scheduler, configured as its own one."""
    if sampler.scheduler is not None:
        scheduler_class: type[SchedulerMixin] = getattr(diffusers_schedulers, sampler.scheduler)
        if type(pipeline.scheduler) is not scheduler_class:
            pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)


def warn_of_long_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> None:
    """Says how many prompts none of the pipeline's tokenizers takes whole; the text encoders do not see their ends."""
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
    """Cuts seeds into batches that go round the processes; smaller ones where some process would get none."""
    size = min(size, max(1, len(seeds) // world_size))
    return (seeds[i : i + size] for i in range(0, len(seeds), size))


@contextmanager
def using_sampler(pipeline: DiffusionPipeline, sampler: SamplerConfig) -> Iterator[None]:
    """`set_sampler` for a while."""
    own = pipeline.scheduler
    set_sampler(pipeline, sampler)
    try:
        yield
    finally:
        pipeline.scheduler = own


@contextmanager
def running_pipeline(pipeline: DiffusionPipeline, mode: Mode) -> Iterator[None]:
    """`running` for all components of a pipeline."""
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

    Returns:
        `[n, channels, height, width]`, float32 in [-1, 1], on the CPU.
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
