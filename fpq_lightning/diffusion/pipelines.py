"""diffusers pipelines: loading, moving, and what keeps one from being quantized."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from torch import nn

from fpq_lightning.diffusion.denoisers import may_denoise
from fpq_lightning.utils.alignment import align
from fpq_lightning.utils.reading import read_json, refuse_special

_NOT_KEPT = {"dtype": "--torch_dtype", "torch_dtype": "--torch_dtype", "token": "the environment variable HF_TOKEN"}
_HOW_TO_LOAD = {  # arguments of ``from_pretrained`` that are none of a pipeline's own
    "cache_dir", "custom_pipeline", "custom_revision", "device_map", "disable_mmap", "force_download",
    "local_files_only", "low_cpu_mem_usage", "max_memory", "offload_folder", "offload_state_dict", "provider",
    "provider_options", "proxies", "quantization_config", "revision", "sess_options", "trust_remote_code",
    "use_onnx", "use_safetensors", "variant",
}  # fmt: skip
_OF_A_CLASS = {"custom_pipeline", "custom_revision", "trust_remote_code"}  # which class opens a pipeline

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
    model: str | Path,
    dtype: torch.dtype = torch.float32,
    arguments: Mapping[str, Any] | None = None,
    kind: type[DiffusionPipeline] = DiffusionPipeline,
) -> DiffusionPipeline:
    """Loads a pipeline from a directory or the hub.

    Args:
        model: the directory or hub id.
        dtype: of its weights.
        arguments: further ones of ``from_pretrained``, such as a component or ``None`` for one to do without.
        kind: class to open it as; `DiffusionPipeline` takes the model's own, if diffusers knows that.

    Raises:
        FileNotFoundError: if `model` looks like a path and there is no pipeline.
        ValueError: if it cannot be loaded.
    """
    given = dict(arguments or {})
    for name in given.keys() & _NOT_KEPT:
        raise ValueError(f"pipeline_arguments cannot hold {name}: use {_NOT_KEPT[name]}")
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "model_index.json").is_file():
            raise FileNotFoundError(f"{path} has no model_index.json: {_instead_of(path)}")
        refuse_special(path)
    elif str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"there is no model at {path}: give a pipeline directory or a hub id such as owner/name"
        )
    try:
        if path.exists():
            options = {"variant": _only_variant(path), **_left_out(path), **given}
            pipeline = kind.from_pretrained(str(path), dtype=dtype, **options)
        else:
            pipeline = _from_hub(str(model), dtype, given, kind)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError) as error:
        if not path.exists() and isinstance(error, OSError):
            raise ValueError(f"there is no directory {model}, and no pipeline of that name on the hub") from error
        reason = " ".join(str(error).split())[:300]
        if method := _foreign_method(path):
            reason = f"its denoiser is stored for readers of {method}, which diffusers cannot be here ({reason})"
        raise ValueError(f"cannot load the pipeline {model}: {reason}") from error
    accepted = {*inspect.signature(type(pipeline).__init__).parameters, *pipeline.components, *_HOW_TO_LOAD}
    if unknown := sorted(given.keys() - accepted):  # of which diffusers only warns
        raise ValueError(f"{type(pipeline).__name__} has no {unknown[0]}: leave it out of pipeline_arguments")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def complete_index(pipeline: DiffusionPipeline, directory: Path) -> None:
    """Makes the index of a written pipeline name the modules of classes that their library does not offer.

    diffusers writes its own name for all of its classes, and looks them up there when it opens the pipeline.
    """
    file = directory / "model_index.json"
    index = read_json(file)
    declared = {name: index[name] for name, component in pipeline.components.items() if component is not None}
    elsewhere = {
        name: [type(getattr(pipeline, name)).__module__, kind]
        for name, (library, kind) in declared.items()
        if library in sys.modules and not hasattr(sys.modules[library], kind)
    }
    if elsewhere:
        file.write_text(json.dumps(index | elsewhere, indent=2, sort_keys=True) + "\n")


def arguments_to_open(pipeline: DiffusionPipeline) -> dict[str, None]:
    """What ``from_pretrained`` is to be told so that it makes a pipeline with the same components: those it lacks."""
    return {name: None for name, component in pipeline.components.items() if component is None}


def arguments_of_quantized(path: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments that loaded a pipeline, those for its quantized files: not which files are read, and how.

    Args:
        path: directory of the quantized pipeline.
        arguments: that loaded the full-precision one.
    """
    index = read_json(path / "model_index.json")
    # What the class takes besides its components may be missing in the index, for not every class writes it.
    kept = index.keys() | _OF_A_CLASS
    return {name: value for name, value in arguments.items() if name in kept or name not in _HOW_TO_LOAD}


def _from_hub(
    model: str, dtype: torch.dtype, arguments: Mapping[str, Any], kind: type[DiffusionPipeline]
) -> DiffusionPipeline:
    try:
        return kind.from_pretrained(model, dtype=dtype, **arguments)
    except (OSError, ValueError) as error:
        try:  # some repositories hold nothing but half precision
            return kind.from_pretrained(model, dtype=dtype, **{"variant": "fp16", **arguments})
        except (OSError, ValueError):
            raise error from None


def _left_out(path: Path) -> dict[str, None]:
    """Components that a pipeline was saved without, such as a text encoder: diffusers wants to be told of each."""
    index = read_json(path / "model_index.json")
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


def quantized_files(path: Path) -> dict[str, tuple[Path, str]]:
    """Of each quantized denoiser of a pipeline its configuration file and the name of its method, by component."""
    found = {}
    for file in sorted(path.glob("*/config.json")):
        try:
            config = read_json(file)
            method, kind = config["quantization_config"]["quant_method"], config.get("_class_name")
        except (ValueError, KeyError, TypeError):
            continue
        if may_denoise(file.parent.name, getattr(diffusers, str(kind), None)):
            found[file.parent.name] = (file, str(method))
    return found


def _foreign_method(path: Path) -> str | None:
    return next((method for _, method in quantized_files(path).values() if method != "fpq"), None)


def class_to_open(pipeline: DiffusionPipeline) -> type[DiffusionPipeline]:
    """The class whose ``from_pretrained`` opens what a pipeline writes: its own, if diffusers does not know that."""
    kind = type(pipeline)
    return DiffusionPipeline if getattr(diffusers, kind.__name__, None) is kind else kind


def move_pipeline(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Moves a pipeline to a device; on a CPU its results do not depend on where its tensors lay in files."""
    pipeline.to(device)
    if device.type == "cpu":
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                align(component)


def take_settings(pipeline: DiffusionPipeline, source: DiffusionPipeline) -> None:
    """Sets components as those of another pipeline were set after loading, which no file says.

    Args:
        pipeline: to set.
        source: whose plain attributes, such as the tiling of a VAE, and processors of attention it takes.
    """
    for name, component in pipeline.components.items():
        like = source.components.get(name)
        if isinstance(component, nn.Module) and type(component) is type(like):
            switches = {k: v for k, v in vars(like).items() if isinstance(v, (bool, int, float))}
            vars(component).update((k, v) for k, v in switches.items() if k in vars(component))
            for path, module in like.named_modules():
                processor = getattr(module, "processor", None)
                if processor is not None and not isinstance(processor, nn.Module):
                    component.get_submodule(path).processor = processor


def check_as_loaded(pipeline: DiffusionPipeline, names: Sequence[str]) -> None:
    """Finds out what was done to components since they were loaded that does not go with quantization.

    Raises:
        ValueError: if one is compiled, as a whole or in parts, for compiled code is that of full-precision layers; if
            it skips work that a cache remembers; or if its weights are not here in a type to compute with.
    """
    for name in names:
        component = getattr(pipeline, name, None)
        modules = list(component.modules()) if isinstance(component, nn.Module) else []
        if any(map(_is_compiled, modules)):
            raise ValueError(f"the pipeline's {name} is compiled: load the model again, quantize it, then compile it")
        if getattr(component, "is_cache_enabled", False):
            raise ValueError(f"the pipeline's {name} has a cache: call its disable_cache() for quantization")
        tensors = [x for module in modules for x in module.parameters(recurse=False)]
        if any(x.is_meta for x in tensors):
            raise ValueError(f"the pipeline's {name} is offloaded: load it plainly, and quantize it with offload")
        if small := next((x.dtype for x in tensors if x.is_floating_point() and x.itemsize == 1), None):
            kind = str(small).removeprefix("torch.")
            raise ValueError(f"the pipeline's {name} keeps weights in {kind}: load it without layerwise casting")


def _is_compiled(module: nn.Module) -> bool:
    forward = vars(module).get("forward")  # of this module alone
    return (
        hasattr(module, "_orig_mod")
        or module._compiled_call_impl is not None
        or hasattr(forward, "_torchdynamo_orig_callable")
    )


def made_empty(denoiser: Any) -> nn.Module | None:
    """A model without weights in memory, made from the configuration of a denoiser; None if it has none to make it."""
    if not hasattr(denoiser, "from_config"):
        return None
    # Arguments that were given by position are among those whose defaults `from_config` would take; files hold them.
    left_out = ("_use_default_values", "quantization_config")
    config = {name: value for name, value in denoiser.config.items() if name not in left_out}
    with torch.random.fork_rng(devices=[]), init_empty_weights():
        fresh = type(denoiser).from_config(config)
    return fresh if type(fresh) is type(denoiser) else None  # it may be a class of an older diffusers


def check_as_configured(denoiser: Any) -> None:
    """Finds out that a model has other tensors than its configuration makes: what is saved of it could not be opened.

    Raises:
        ValueError: if it has.
    """
    fresh = made_empty(denoiser)
    if fresh is None:
        return
    made, found = ({k: tuple(v.shape) for k, v in model.state_dict().items()} for model in (fresh, denoiser))
    if changed := next((name for name in {**found, **made} if found.get(name) != made.get(name)), None):
        raise ValueError(
            f"{changed} of the denoiser is not as its configuration says (adapters, fused projections or the like), so "
            "its quantized files could not be opened: load the model again and quantize it as it is"
        )
