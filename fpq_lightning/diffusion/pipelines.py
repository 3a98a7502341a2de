"""diffusers pipelines: loading, and finding the denoiser."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from torch import nn

from fpq_lightning.utils.alignment import align

DENOISERS = ("transformer", "unet", "prior", "decoder")

_WEIGHTS = re.compile(  # files of weights; a part's number may come before its variant or after it
    r"(diffusion_pytorch_model|pytorch_model|model)(-\d+-of-\d+)?(\.(?P<variant>[a-z]\w*?))?(-\d+-of-\d+)?"
    r"\.(safetensors|bin)"
)


def pipeline_class(name: str | None) -> type[DiffusionPipeline]:
    """A pipeline class of diffusers; `DiffusionPipeline`, which opens each model as its own class, for None.

    Raises:
        ValueError: if there is none of that name.
    """
    found = DiffusionPipeline if name is None else getattr(diffusers, name, None)
    if not (inspect.isclass(found) and hasattr(found, "from_pretrained") and "Pipeline" in found.__name__):
        raise ValueError(f"diffusers has no pipeline {name!r}: use for example StableDiffusionImg2ImgPipeline")
    return cast("type[DiffusionPipeline]", found)


def load_pipeline(
    model: str | Path, dtype: torch.dtype = torch.float32, kind: type[DiffusionPipeline] = DiffusionPipeline
) -> DiffusionPipeline:
    """Loads a pipeline from a directory or the hub.

    Args:
        model: directory or hub id.
        dtype: of the weights.
        kind: class to open it as; `DiffusionPipeline` takes the model's own.

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
        if path.exists():
            options = {"variant": _only_variant(path), **_left_out(path)}
            pipeline = kind.from_pretrained(str(path), dtype=dtype, **options)
        else:
            pipeline = _from_hub(str(model), dtype, kind)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError) as error:
        if not path.exists() and isinstance(error, OSError):
            raise ValueError(f"there is no directory {model}, and no pipeline of that name on the hub") from error
        reason = " ".join(str(error).split())[:300]
        if method := _foreign_method(path):
            reason = f"its denoiser is stored for readers of {method}, which diffusers cannot be here ({reason})"
        raise ValueError(f"cannot load the pipeline {model}: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _from_hub(model: str, dtype: torch.dtype, kind: type[DiffusionPipeline]) -> DiffusionPipeline:
    try:
        return kind.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as error:
        try:  # some repositories hold nothing but half precision
            return kind.from_pretrained(model, dtype=dtype, variant="fp16")
        except (OSError, ValueError):
            raise error from None


def _left_out(path: Path) -> dict[str, None]:
    """Components that a pipeline was saved without, such as a text encoder: diffusers wants to be told of each."""
    index = json.loads((path / "model_index.json").read_text())
    return {name: None for name, entry in index.items() if entry == [None, None]}


def _only_variant(path: Path) -> str | None:
    """The variant, such as ``fp16``, of the weights of a component that has no others; None if each has plain ones."""
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        found = {match["variant"] for file in folder.iterdir() if (match := _WEIGHTS.fullmatch(file.name))}
        if found and None not in found:
            return "fp16" if "fp16" in found else min(found)
    return None


def _instead_of(path: Path) -> str:
    """A hint for a directory that holds no pipeline."""
    if (path / "quantized" / "model_index.json").is_file():
        return f"give {path / 'quantized'}"
    part = "it is a single model, " if (path / "config.json").is_file() else ""
    return f"{part}give the directory of a diffusers pipeline"


def quantization_of(path: Path) -> tuple[Path, str] | None:
    """The configuration file of a pipeline's quantized denoiser and the name of its method; None if not quantized."""
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
    """The name of the pipeline's denoiser: the first of `DENOISERS` that it has.

    Raises:
        ValueError: if it has none.
    """
    for name in DENOISERS:
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise ValueError(f"{type(pipeline).__name__} has no denoiser: it needs one of {', '.join(DENOISERS)}")


def warn_of_further_denoisers(pipeline: DiffusionPipeline) -> None:
    """Names components of the denoiser's class, such as Wan 2.2's second transformer, which stay in full precision."""
    name = denoiser_name(pipeline)
    kind = type(getattr(pipeline, name))
    further = [key for key, component in pipeline.components.items() if key != name and type(component) is kind]
    if further:
        warnings.warn(
            f"{', '.join(further)}: only the pipeline's {name} is quantized, so this denoiser stays in full precision",
            stacklevel=3,
        )


def move_pipeline(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Moves a pipeline to a device; on a CPU its results do not depend on where its tensors lay in files."""
    pipeline.to(device)
    if device.type == "cpu":
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                align(component)


def check_not_compiled(pipeline: DiffusionPipeline, names: Sequence[str]) -> None:
    """Finds out that components are compiled, as a whole or in parts.

    Raises:
        ValueError: if one is: compiled code is that of full-precision layers.
    """
    for name in names:
        component = getattr(pipeline, name, None)
        modules = component.modules() if isinstance(component, nn.Module) else ()
        if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in modules):
            raise ValueError(f"the pipeline's {name} is compiled: load the model again, quantize it, then compile it")


def check_as_configured(denoiser: Any) -> None:
    """Finds out that a model has other tensors than its configuration makes: what is saved of it could not be opened.

    Raises:
        ValueError: if it has.
    """
    if not hasattr(denoiser, "from_config"):
        return
    # Arguments that were given by position are among those whose defaults `from_config` would take; files hold them.
    config = {name: value for name, value in denoiser.config.items() if name != "_use_default_values"}
    with torch.random.fork_rng(devices=[]), init_empty_weights():
        fresh = type(denoiser).from_config(config)
    if type(fresh) is not type(denoiser):  # a class of an older diffusers
        return
    made, found = ({k: tuple(v.shape) for k, v in model.state_dict().items()} for model in (fresh, denoiser))
    if changed := next((name for name in {**found, **made} if found.get(name) != made.get(name)), None):
        raise ValueError(
            f"{changed} of the denoiser is not as its configuration says (adapters, fused projections or the like), so "
            "its quantized files could not be opened: load the model again and quantize it as it is"
        )
