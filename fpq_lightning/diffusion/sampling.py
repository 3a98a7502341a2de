"""Sampling images: image i is a function of seed i alone, whatever the batch and the device."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers import schedulers as diffusers_schedulers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fpq_lightning.diffusion.dataset_files import open_dataset, state_of
from fpq_lightning.diffusion.media import SOUND, medium_of
from fpq_lightning.diffusion.outputs import sampling_rate, tensor_of
from fpq_lightning.diffusion.processors import kept_if_interrupted
from fpq_lightning.diffusion.prompts import load_prompts
from fpq_lightning.nn.calibrated import Mode, running
from fpq_lightning.utils.values import Count, check_values

if TYPE_CHECKING:
    import datasets

_KEPT_PROMPTS = 32


@dataclass
class SamplerConfig:
    """How images are sampled, both for calibration and for evaluation.

    Making one reads no file; `check` does.

    Attributes:
        scheduler: class name of a diffusers scheduler, which takes over the configuration of the pipeline's own one;
            null keeps the pipeline's scheduler.
        steps: number of inference steps; null is the pipeline's default.
        guidance_scale: scale of classifier-free guidance; null is the pipeline's default.
        prompts: prompts for a text-to-image pipeline: a list, a file (.txt, .csv, .tsv, .parquet) or a `datasets`
            dataset. Seed i takes prompt i, starting over after the last prompt.
        prompt_column: column of that file or dataset; null takes ``prompt``, ``caption`` or ``text``.
        negative_prompt: negative prompt for all images.
        height: image height; null is the pipeline's default.
        width: image width; null is the pipeline's default.
        arguments: further arguments of the pipeline, the same for all images.
        inputs: a `datasets` dataset (name or directory), or a .parquet or .jsonl file, whose columns are further
            arguments of the pipeline, such as ``image`` or ``class_labels``. Seed i takes row i, starting over after
            the last row.
        batch_size: images that are sampled at once.
    """

    scheduler: str | None = None
    steps: Count | None = None
    guidance_scale: float | None = None
    prompts: str | list[str] | None = None
    prompt_column: str | None = None
    negative_prompt: str | None = None
    height: Count | None = None
    width: Count | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    inputs: str | None = None
    batch_size: Count = 16

    def __post_init__(self) -> None:
        self.inputs = None if self.inputs is None else os.fspath(self.inputs)
        check_values(self, "sampler")
        if self.scheduler is not None and not hasattr(diffusers_schedulers, self.scheduler):
            raise ValueError(f"diffusers has no scheduler {self.scheduler!r}: use for example DDIMScheduler")

    def check(self) -> None:
        """Reads the prompts, so that a mistake is found before minutes are spent.

        Raises:
            FileNotFoundError: if there is no such file or dataset.
            ValueError: if a prompt is empty, there are none, or an argument is more than a file of a run can keep.
        """
        for name, value in self.arguments.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"sampler.arguments.{name} is no plain value ({error}): give it in a column of sampler.inputs, or "
                    "sample with a function"
                ) from error
        if self.prompts is not None:
            load_prompts(self.prompts, self.prompt_column)
        if self.inputs is not None:
            load_inputs(self.inputs)

    def prompts_of(self, seeds: Sequence[int]) -> list[str] | None:
        """The prompt of each seed; None if there are no prompts."""
        if self.prompts is None:
            return None
        prompts = load_prompts(self.prompts, self.prompt_column)
        return [prompts[seed % len(prompts)] for seed in seeds]

    def inputs_of(self, seeds: Sequence[int]) -> dict[str, Any]:
        """The further arguments of each seed."""
        if self.inputs is None:
            return {}
        rows = load_inputs(self.inputs)
        chosen = rows[[seed % len(rows) for seed in seeds]]
        return {name: _of_images(list(chosen[name])) for name in rows.column_names}

    def kept(self) -> dict[str, Any]:
        """What a quantized model says it was sampled with: the options that were given, and the first prompts."""
        values = {k: v for k, v in self._given().items() if k not in ("batch_size", "prompt_column")}
        if self.prompts is not None:
            values["prompts"] = list(dict.fromkeys(load_prompts(self.prompts, self.prompt_column)))[:_KEPT_PROMPTS]
        return values

    def or_else(self, kept: Mapping[str, Any]) -> SamplerConfig:
        """The same with what `kept` gave, where nothing was given here."""
        known = {k: v for k, v in kept.items() if k in asdict(self)}
        return SamplerConfig(**{**known, **self._given()})

    def _given(self) -> dict[str, Any]:
        """The options that are not the default."""
        defaults = asdict(SamplerConfig())
        return {k: v for k, v in asdict(self).items() if v != defaults.get(k)}

    def identity(self) -> dict[str, Any]:
        """What decides the image of a seed: all options but the batch size, and hashes of prompts and inputs."""
        values = {k: v for k, v in asdict(self).items() if k not in ("batch_size", "prompt_column")}
        values = {k: v for k, v in values.items() if k not in ("arguments", "inputs") or v}
        if self.prompts is not None:
            values["prompts"] = _hash("\0".join(load_prompts(self.prompts, self.prompt_column)).encode())
        if self.inputs is not None:
            file = Path(self.inputs).expanduser()
            dataset = load_inputs(self.inputs)
            values["inputs"] = _hash(file.read_bytes()) if file.is_file() else dataset._fingerprint
        return values


def _of_images(values: list[Any]) -> Any:
    """The values of a column: nested numbers, such as embeddings, as one tensor."""
    first = values[0]
    while isinstance(first, list) and first:
        first = first[0]
    is_nested = isinstance(values[0], list) and isinstance(first, (bool, int, float))
    return torch.tensor(values) if is_nested else values


@dataclass
class FunctionSampler(SamplerConfig):
    """Images of a function of the user's own.

    Attributes:
        function: takes the pipeline and a list of seeds; calls the pipeline, and gives its output or images: PIL
            images, an array `[n, height, width, channels]` in [0, 1], or a tensor `[n, channels, height, width]` in
            [-1, 1]. Videos have an axis of frames after the first; sounds are `[n, channels, samples]`.
    """

    function: Callable[[DiffusionPipeline, list[int]], Any] | None = None

    def identity(self) -> dict[str, Any]:
        """The options of the base class, and the name of the function."""
        function = cast(Any, self.function)
        return {**super().identity(), "function": f"{function.__module__}.{function.__qualname__}"}

    def kept(self) -> dict[str, Any]:
        """Nothing: a function cannot be kept."""
        return {}


def load_inputs(source: str) -> datasets.Dataset:
    """Opens a dataset whose columns are arguments of a pipeline; again if its files have changed.

    Raises:
        FileNotFoundError: if there is no such file or dataset.
        ValueError: if it is empty.
    """
    return _opened(source, state_of(source))


@lru_cache(maxsize=4)
def _opened(source: str, state: tuple[Any, ...]) -> datasets.Dataset:
    dataset = open_dataset(source, f"there is no dataset sampler.inputs {source}")
    if not len(dataset):
        raise ValueError(f"sampler.inputs {source} has no rows")
    return dataset


def _hash(contents: bytes) -> str:
    return hashlib.blake2b(contents, digest_size=8).hexdigest()


def set_sampler(pipeline: DiffusionPipeline, sampler: SamplerConfig) -> None:
    """Gives the pipeline the sampler's scheduler, with the configuration of its own one.

    Raises:
        ValueError: if that configuration is of another kind of diffusion, such as flow matching.
    """
    if sampler.scheduler is None:
        return
    scheduler_class: type[SchedulerMixin] = getattr(diffusers_schedulers, sampler.scheduler)
    own = pipeline.scheduler
    if type(own) is scheduler_class:
        return
    # Some classes can do flow matching, too, if their configuration says so.
    is_flow = own.config.get("use_flow_sigmas") or own.config.get("prediction_type") == "flow_prediction"
    fits = scheduler_class in own.compatibles
    if is_flow:
        fits = fits and "use_flow_sigmas" in inspect.signature(scheduler_class.__init__).parameters
    if not fits:
        raise ValueError(
            f"sampler.scheduler {sampler.scheduler} does not fit the pipeline's {type(own).__name__}: leave it out, or "
            "use one that is compatible with it"
        )
    _replace_scheduler(pipeline, scheduler_class.from_config(own.config))


def _replace_scheduler(pipeline: DiffusionPipeline, scheduler: Any) -> None:
    """Gives a pipeline a scheduler, and with it the pipelines inside of it that run with its own one."""
    own = pipeline.scheduler
    for part in (pipeline, *vars(pipeline).values()):
        if isinstance(part, DiffusionPipeline) and getattr(part, "scheduler", None) is own:
            part.scheduler = scheduler


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


def shortened(pipeline: DiffusionPipeline, sampler: SamplerConfig, **options: Any) -> SamplerConfig:
    """The sampler with two steps, if the pipeline takes a number of steps, and other options.

    Pipelines of several stages take a number for each. Those that begin with a noised image leave out all steps but a
    share, their strength.
    """
    accepted = inspect.signature(pipeline.__call__).parameters
    strength = sampler.arguments.get("strength", accepted["strength"].default if "strength" in accepted else 1.0)
    steps = math.ceil(2 / strength) if isinstance(strength, (int, float)) and 0 < strength <= 1 else 2
    if "num_inference_steps" in accepted:
        options["steps"] = steps
    stages = {name: steps for name in accepted if name.endswith("_num_inference_steps")}
    return replace(sampler, arguments=sampler.arguments | stages, **options)


@contextmanager
def using_sampler(pipeline: DiffusionPipeline, sampler: SamplerConfig) -> Iterator[None]:
    """Within the block the pipeline has the sampler's scheduler."""
    own = getattr(pipeline, "scheduler", None)
    set_sampler(pipeline, sampler)
    try:
        yield
    finally:
        if own is not None:
            _replace_scheduler(pipeline, own)


@contextmanager
def running_pipeline(pipeline: DiffusionPipeline, mode: Mode) -> Iterator[None]:
    """Within the block all quantized layers of a pipeline's components run in `mode`."""
    with ExitStack() as stack:
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                stack.enter_context(running(component, mode))
        yield


@torch.no_grad()
def generate(
    pipeline: DiffusionPipeline, sampler: SamplerConfig, seeds: Sequence[int], prompts: Sequence[str] | None = None
) -> Any:
    """Calls a pipeline for one image, video or sound for each seed.

    Number i starts from ``torch.Generator("cpu").manual_seed(seeds[i])``, whatever the batch and the device.

    Args:
        pipeline: with the sampler's scheduler, see `using_sampler`.
        sampler: steps, guidance, size, prompts and further arguments.
        seeds: a seed for each image.
        prompts: a prompt for each image; None takes those of the sampler.

    Returns:
        What the pipeline gives.

    Raises:
        ValueError: if an option does not fit the pipeline, or prompts or other arguments are missing.
    """
    try:
        with kept_if_interrupted(pipeline):
            if isinstance(sampler, FunctionSampler):
                return cast(Any, sampler.function)(pipeline, list(seeds))
            with _drawing_from(seeds[0], pipeline.device):
                return pipeline(**_arguments(pipeline, sampler, seeds, prompts))
    except TypeError as error:
        if "BFloat16" not in str(error):
            raise
        kind = type(pipeline).__name__
        raise ValueError(f"{kind} cannot make images of a bfloat16 model: load it in float32") from error


@contextmanager
def _drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block numbers drawn without a generator depend on the seed: some pipelines encode images with such."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed % 2**64)
        yield


def sample(
    pipeline: DiffusionPipeline, sampler: SamplerConfig, seeds: Sequence[int], prompts: Sequence[str] | None = None
) -> Tensor:
    """Samples one image, video or sound for each seed, as `generate` does.

    Returns:
        float32 on the CPU: images `[n, 3, height, width]`, videos `[n, frames, 3, height, width]` or sounds
        `[n, channels, samples]` in [-1, 1]; or latents `[n, values]`.

    Raises:
        ValueError: as `generate`; or if the pipeline gives nothing of the kind, or sounds of an unknown rate.
    """
    found = tensor_of(
        generate(pipeline, sampler, seeds, prompts), len(seeds), sampler.arguments.get("output_type") == "latent"
    )
    if medium_of(found) is SOUND and sampling_rate(pipeline) is None:
        raise ValueError(
            f"nothing in {type(pipeline).__name__} tells the sampling rate of its sound: set pipeline.sampling_rate, "
            "or --evaluation.n_images 0"
        )
    return found


def _arguments(
    pipeline: DiffusionPipeline, sampler: SamplerConfig, seeds: Sequence[int], prompts: Sequence[str] | None
) -> dict[str, Any]:
    """What a pipeline is called with."""
    kind, accepted = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters
    n, negative = len(seeds), sampler.negative_prompt
    defaults = {"generator": [torch.Generator("cpu").manual_seed(seed % 2**64) for seed in seeds], "output_type": "np"}
    arguments: dict[str, Any] = {name: value for name, value in defaults.items() if name in accepted}
    chosen: dict[str, Any] = {
        "num_inference_steps": ("steps", sampler.steps),
        "guidance_scale": ("guidance_scale", sampler.guidance_scale),
        "negative_prompt": ("negative_prompt", None if negative is None else [negative] * n),
        "height": ("height", sampler.height),
        "width": ("width", sampler.width),
    }
    given = {name: value for name, (_, value) in chosen.items() if value is not None}
    given |= sampler.arguments | sampler.inputs_of(seeds)
    of_seeds = {"prompt", "negative_prompt", *given} - sampler.arguments.keys()
    for name in given:
        if name not in accepted:
            option = chosen[name][0] if name in chosen else "inputs" if name not in sampler.arguments else "arguments"
            raise ValueError(f"{kind} has no {name}: leave it out of sampler.{option}")
    arguments |= given
    prompts = sampler.prompts_of(seeds) if prompts is None else prompts
    if "prompt" in accepted:
        if prompts is not None:
            arguments["prompt"] = list(prompts)
        elif not any(name.startswith("prompt") for name in given) and "image" not in given:
            raise ValueError(f"{kind} is conditioned on text: give prompts with --sampler.prompts")
    elif prompts is not None:
        raise ValueError(f"{kind} is not conditioned on text: leave the prompts out")
    elif "batch_size" in accepted:
        arguments["batch_size"] = n
    required = [
        name
        for name, p in accepted.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in arguments
    ]
    if required:
        raise ValueError(
            f"{kind} needs {', '.join(required)}: give a dataset with such columns as --sampler.inputs, or values for "
            "all images in --sampler.arguments"
        )
    return {k: bare(v, accepted[k]) if k in of_seeds else v for k, v in arguments.items()}


def bare(values: Any, parameter: inspect.Parameter) -> Any:
    """The text, image or list of images of a batch of one, if the parameter takes such: some pipelines take no list."""
    if not isinstance(values, list) or len(values) != 1:
        return values
    kinds, nested = str(parameter.annotation), re.compile(r"(list|List|Sequence)\[[^\[\]]*\]")
    while nested.search(kinds):
        kinds = nested.sub("", kinds)
    takes = isinstance(values[0], list) or ("str" if isinstance(values[0], str) else "Image") in kinds
    return values[0] if takes and not isinstance(values[0], (bool, int, float)) else values
