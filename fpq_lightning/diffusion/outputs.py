"""What a pipeline gave, as one tensor whose number of axes says what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from fpq_lightning.diffusion.media import from_bytes, from_samples

_PIXELS = ("images", "image", "frames")  # fields of diffusers' outputs
_SOUNDS = ("audios", "audio")
_RATES = ("sampling_rate", "sample_rate")  # entries of configurations


def tensor_of(output: Any, n: int, as_latents: bool = False) -> Tensor:
    """What a pipeline gave for n seeds, float32 on the CPU, as `media` lists it.

    Pixels and sound are known by the field that holds them and by their shape, or by their number of axes alone where
    there are no fields. Everything else is latents: embeddings, maps of other channels than those of colours.

    Args:
        output: an output of diffusers, a tuple whose first entry counts, or bare arrays or images. Arrays and the
            tensors of diffusers hold pixels in [0, 1], bare tensors in [-1, 1]; integers are of full scale.
        n: number of seeds.
        as_latents: whether the pipeline was asked for latents, which may look like pixels.

    Raises:
        ValueError: if it gave nothing of the kind, things of several shapes, or another number of them.
    """
    kind = type(output).__name__
    field, found = _main_field(output)
    values = _joined(found, kind)
    if len(values) != n:
        raise ValueError(f"{kind} holds {len(values)} outputs for {n} seeds: a pipeline must give one for each")
    as_latents = as_latents and isinstance(values, Tensor)  # a pipeline that knows no latents gives arrays
    if not as_latents and field in (None, *_PIXELS) and (pixels := _pixels(values, field is None)) is not None:
        return pixels
    tensor = torch.as_tensor(values).cpu()
    tensor = from_samples(tensor) if tensor.dtype == torch.int16 else tensor.float()
    if not as_latents and ((field in _SOUNDS and tensor.ndim in (2, 3)) or (field is None and tensor.ndim == 3)):
        return tensor.reshape(n, -1, tensor.shape[-1])
    return tensor.reshape(n, -1)


def sampling_rate(pipeline: DiffusionPipeline) -> int | None:
    """Samples a second of a pipeline's sound, as it or the configuration of a model tells; None if none does.

    What makes the sound tells it, before what else a pipeline may have.
    """
    components = pipeline.components
    models = [components.get(name) for name in ("vocoder", "vae")] + list(components.values())
    configs = [pipeline, pipeline.config, *(getattr(model, "config", None) for model in models)]
    rates = (getattr(config, name, None) for config in configs for name in _RATES)
    return next((int(rate) for rate in rates if rate), None)


def _main_field(output: Any) -> tuple[str | None, Any]:
    """The name and the value of the field that counts; no name for what has no fields."""
    if isinstance(output, tuple):
        return None, output[0] if output else None
    if isinstance(output, (list, np.ndarray, Tensor)):
        return None, output
    fields = dict(output) if isinstance(output, Mapping) else dict(getattr(output, "__dict__", {}))
    given = {name: value for name, value in fields.items() if value is not None}
    name = next((name for name in (*_PIXELS, *_SOUNDS, *given) if name in given), "")
    return name, given.get(name)


def _joined(value: Any, kind: str) -> np.ndarray | Tensor:
    """Nested lists of images or arrays as one array, those of tensors as one tensor."""
    if isinstance(value, Image.Image):
        return np.asarray(value.convert("RGB"))
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim:
        return value
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(
            f"{kind} holds no images, video, sound or latents: such pipelines can be calibrated, but not judged; set "
            "--evaluation.n_images 0"
        )
    parts = [_joined(part, kind) for part in value]
    if len({(isinstance(part, Tensor), tuple(part.shape)) for part in parts}) > 1:
        raise ValueError(
            f"{kind} holds outputs of several shapes, which cannot be compared: set --evaluation.n_images 0"
        )
    return torch.stack(parts) if isinstance(parts[0], Tensor) else np.stack(parts)  # type: ignore[arg-type]


def _pixels(values: np.ndarray | Tensor, bare: bool) -> Tensor | None:
    """Images or videos in [-1, 1]; None if they are no such."""
    if values.ndim not in (4, 5):
        return None
    pixels = values.cpu() if isinstance(values, Tensor) else torch.from_numpy(values).movedim(-1, -3)
    if pixels.shape[-3] not in (1, 3, 4):
        return None
    pixels = pixels[..., :3, :, :]  # without transparency
    pixels = pixels.expand(*pixels.shape[:-3], 3, *pixels.shape[-2:])  # gray, too
    if pixels.dtype == torch.uint8:
        return from_bytes(pixels)
    return pixels.float() if bare and isinstance(values, Tensor) else pixels.float().mul(2).sub(1)
