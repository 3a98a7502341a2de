"""Quantized diffusers pipelines on disk: writing in any form (`fpq_lightning.storage.exports`), and reading.

Packed and dequantized pipelines are read here; the other forms are for other libraries.
"""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError
from torch import nn
from torch.utils._pytree import tree_leaves

from fpq_lightning.diffusion.denoisers import as_one, find_denoisers, quantized_denoisers
from fpq_lightning.diffusion.pipelines import (
    arguments_of_quantized,
    class_to_open,
    complete_index,
    load_pipeline,
    made_empty,
    quantized_files,
)
from fpq_lightning.nn.attention import QuantizedAttention, quantized_attention
from fpq_lightning.nn.calibrated import QuantizedLayer, quantized_layers
from fpq_lightning.nn.convert import make_plain, pack_attention, pack_layer, quantized_weight
from fpq_lightning.nn.packed_layer import PackedLayer, packed_layers
from fpq_lightning.nn.swap import SwappedModule, restore
from fpq_lightning.storage import dequantized
from fpq_lightning.storage.config import FPQConfig, QuantizationMethod
from fpq_lightning.storage.diffusers_quantizer import check_fits
from fpq_lightning.storage.exports.registry import EXPORTS, Export
from fpq_lightning.storage.headers import check_plain, read_header
from fpq_lightning.utils.digests import changed_files, write_digests
from fpq_lightning.utils.files import atomic_directory, atomic_write
from fpq_lightning.utils.reading import check_tree, read_json

_MADE_BY = "Made by fpq_lightning"
_MANY = 1024  # layers, or steps of a scheduler

_README = """# A quantized diffusion model

{made_by} {version} from `{base_model}`.

{usage}"""


@contextmanager
def _restored(models: Sequence[nn.Module]) -> Iterator[None]:
    """Restores the quantized modules of models, and their configurations, after a block that changes them.

    Within the block no quantizer looks whether the models are still as they were opened.
    """

    def state(module: nn.Module) -> dict[str, Any]:
        return {k: copy.copy(v) if k in ("_parameters", "_buffers", "_modules") else v for k, v in vars(module).items()}

    quantized = [m for model in models for m in model.modules() if isinstance(m, SwappedModule)]
    before = [(module, type(module), state(module)) for module in quantized]
    configurations = [(model, model._internal_dict) for model in models if hasattr(model, "_internal_dict")]
    others = [model.config for model in models if not hasattr(model, "_internal_dict") and hasattr(model, "config")]
    options = [(config, dict(vars(config))) for config in others if hasattr(config, "__dict__")]  # of transformers
    quantizers = [(model, vars(model).pop("hf_quantizer")) for model in models if "hf_quantizer" in vars(model)]
    try:
        yield
    finally:
        for module, kind, attributes in before:
            module.__class__ = kind
            module.__dict__ = attributes
        for model, configuration in configurations:
            model._internal_dict = configuration
        for config, values in options:
            config.__dict__ = values
        for model, quantizer in quantizers:
            model.hf_quantizer = quantizer


def save_quantized(
    pipeline: DiffusionPipeline,
    directory: Path,
    details: Mapping[str, Any],
    form: str = "fpq",
    of_each: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes a quantized pipeline, whole or not at all; the pipeline stays as it is.

    Args:
        pipeline: its denoisers' layers have the variant ``quantized`` or are packed.
        directory: replaced if it is empty or `is_written`.
        details: where it comes from: ``base_model``, ``recipe``, ``version``, ``fingerprint``.
        form: the name of an export.
        of_each: further details of each denoiser that is quantized, by component; None finds these out.

    Raises:
        ValueError: if there is no such export, a quantized weight holds NaN or Inf, no layer fits the export, or the
            directory holds something else.
    """
    export = EXPORTS[form]
    with atomic_directory(directory, is_written) as temporary, _in_form(pipeline, details, of_each, export, temporary):
        try:
            type(pipeline).save_pretrained(pipeline, temporary)
            complete_index(pipeline, temporary)
        except SafetensorError as error:
            raise OSError(errno.EIO, f"{error}", str(directory)) from error
        names = {"version": details.get("version", "?"), "base_model": details.get("base_model", "?")}
        (temporary / "README.md").write_text(_README.format(made_by=_MADE_BY, **names, usage=export.usage))
        write_digests(temporary)


@contextmanager
def _in_form(
    pipeline: DiffusionPipeline,
    details: Mapping[str, Any],
    of_each: Mapping[str, Mapping[str, Any]] | None,
    export: Export,
    directory: Path,
) -> Iterator[None]:
    """Within the block the pipeline is what `save_pretrained` writes in the form of an export."""
    if of_each is None:
        of_each = {name: {} for name in quantized_denoisers(pipeline)}
    details = {**details, **(next(iter(of_each.values())) if len(of_each) == 1 else {"denoisers": of_each})}
    denoiser = as_one({name: getattr(pipeline, name) for name in of_each})
    calibrated = {name: layer for name, layer in quantized_layers(denoiser).items() if "quantized" in layer.variants}
    stored: dict[str, QuantizedLayer | PackedLayer] = {**calibrated, **packed_layers(denoiser)}
    for name, layer in stored.items():
        if not quantized_weight(layer).isfinite().all():
            raise ValueError(f"{name}: its quantized weight holds NaN or Inf; nothing was written")
    components = [c for c in pipeline.components.values() if isinstance(c, nn.Module)]
    with _restored(components):
        for chosen in calibrated.values():
            pack_layer(chosen, chosen.variants["quantized"])
        for attention in quantized_attention(denoiser).values():
            if isinstance(attention, QuantizedAttention) and "quantized" in attention.variants:
                pack_attention(attention)
        for component in components:
            for left in quantized_layers(component).values():
                make_plain(left)
        export.convert(pipeline, details, directory)
        yield


def check_form(
    pipeline: DiffusionPipeline,
    directory: Path,
    details: Mapping[str, Any],
    of_each: Mapping[str, Mapping[str, Any]],
) -> None:
    """Finds out that what `save_quantized` would write cannot be opened, without writing weights.

    Each denoiser is compared with an empty one of its configuration. The rest of the pipeline is written and opened,
    but for its networks, which the opened one shares.

    Args:
        pipeline: as `save_quantized` takes it.
        directory: a scratch directory.
        details: as `save_quantized` takes them.
        of_each: as `save_quantized` takes it.

    Raises:
        ValueError: if it cannot be opened.
    """
    with _in_form(pipeline, details, of_each, EXPORTS["fpq"], directory):
        for denoiser in (getattr(pipeline, name) for name in of_each):
            if (empty := made_empty(denoiser)) is not None:
                check_fits(denoiser, empty)
        pipeline.save_config(directory)
        complete_index(pipeline, directory)
        networks = {name: c for name, c in pipeline.components.items() if isinstance(c, nn.Module)}
        for name, component in pipeline.components.items():
            if name not in networks and hasattr(component, "save_pretrained"):
                component.save_pretrained(directory / name)
        load_pipeline(directory, arguments=networks, kind=class_to_open(pipeline))


def load_quantized(
    directory: str | Path, kind: type[DiffusionPipeline] = DiffusionPipeline, verify: bool = False
) -> DiffusionPipeline:
    """Opens a packed or dequantized pipeline, with all activation formats in force.

    Sizes of files, configurations and headers are always compared with what was written.

    Args:
        directory: of the pipeline.
        kind: class to open it as; `DiffusionPipeline` takes the one that it was written as, if diffusers knows that.
        verify: whether the weights are, too, which takes a second for each GB.

    Raises:
        FileNotFoundError: if there is no such pipeline.
        ValueError: if a file is damaged, of another version, or does not fit the model.
    """
    path = Path(directory).expanduser()
    check_tree(path)
    files = _packed_files(path)
    for config in files.values():
        for file in sorted(config.parent.glob("*.safetensors")):
            read_header(file)  # its error names the tensor that is cut off, unlike that of diffusers
    changed = changed_files(path, verify)
    if endless := next((file for file in changed if _makes_endless(file)), None):
        raise ValueError(changed[endless])
    kept = pipeline_arguments_of(path) if is_quantized(path) else {}
    arguments = arguments_of_quantized(path, kept) if kept else {}
    pipeline = load_pipeline(directory, arguments=arguments, kind=kind)
    for name, component in pipeline.components.items():
        if isinstance(component, ModelMixin) and name not in files and _is_written_as(component, path / name):
            check_plain(component, path / name)  # diffusers fills what is missing with random numbers
    for denoiser in quantized_denoisers(pipeline).values():
        denoiser.eval().requires_grad_(False)
    if not files:
        for name, denoiser, description in described_denoisers(pipeline, directory):
            check_plain(denoiser, path / name, exact=True)
            dequantized.apply_inputs(denoiser.eval().requires_grad_(False), description)
        cast(Any, pipeline).save_pretrained = partial(
            _save_dequantized, pipeline, (path / dequantized.FILE).read_text()
        )
    if changed:  # last, for other errors say what in a file is wrong
        raise ValueError(next(iter(changed.values())))
    return pipeline


def _is_written_as(component: ModelMixin, directory: Path) -> bool:
    """Whether a directory holds a model of the component's class, and not one of several that it is made of."""
    return read_json(directory / "config.json").get("_class_name") == type(component).__name__


def _makes_endless(changed: Path) -> bool:
    """Whether a configuration that was changed may ask for more layers or steps than can be made."""
    if changed.suffix != ".json" or changed.name == dequantized.FILE:
        return False
    try:
        values = read_json(changed)
    except ValueError:
        return False
    own = {k: v for k, v in values.items() if k != "quantization_config"} if isinstance(values, dict) else values
    return any(isinstance(value, (int, float)) and abs(value) > _MANY for value in tree_leaves(own))


def _save_dequantized(
    pipeline: DiffusionPipeline, description: str, save_directory: str | Path, *args: Any, **kwargs: Any
) -> None:
    """`save_pretrained` of an opened dequantized pipeline: also writes the description that it was opened with."""
    models = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    with _restored(models):
        for module in [m for model in models for m in model.modules() if isinstance(m, SwappedModule)]:
            restore(module)
        with atomic_write(Path(save_directory) / dequantized.FILE) as temporary:
            temporary.write_text(description)
        type(pipeline).save_pretrained(pipeline, save_directory, *args, **kwargs)


def is_written(directory: Path) -> bool:
    """Whether `save_quantized` has written a directory, in any form; its files may be damaged."""
    readme = directory / "README.md"
    return is_quantized(directory) or (readme.is_file() and _MADE_BY in readme.read_text(errors="replace"))


def _packed_files(directory: Path) -> dict[str, Path]:
    """The configurations of the packed denoisers of a pipeline, by component."""
    found = quantized_files(directory)
    return {name: file for name, (file, method) in found.items() if method == QuantizationMethod.FPQ.value}


def is_quantized(directory: str | Path) -> bool:
    """Whether a directory holds a quantized pipeline that `load_quantized` opens."""
    path = Path(directory).expanduser()
    return os.path.lexists(path / dequantized.FILE) or bool(_packed_files(path))


def read_descriptions(directory: str | Path) -> dict[str, dict[str, Any]]:
    """The descriptions of the denoisers of a quantized pipeline, by component.

    Each has formats of its ``layers``, ``base_model``, ``recipe``, ``version``. The name of an only one may be empty.

    Raises:
        ValueError: if one is damaged or of another version.
    """
    path = Path(directory).expanduser()
    files = _packed_files(path)
    if not files:
        return dequantized.read_descriptions(path)
    configs = {name: read_json(file)["quantization_config"] for name, file in files.items()}
    return {name: FPQConfig.from_dict(config).to_dict() for name, config in configs.items()}


def pipeline_arguments_of(directory: str | Path) -> dict[str, Any]:
    """What ``from_pretrained`` was told when the pipeline was loaded that is quantized here."""
    return dict(read_description(directory).get("pipeline_arguments", {}))


def read_description(directory: str | Path) -> dict[str, Any]:
    """The first of `read_descriptions`: what the denoisers have in common is in all of them."""
    return next(iter(read_descriptions(directory).values()))


def described_denoisers(
    pipeline: DiffusionPipeline, directory: str | Path
) -> list[tuple[str, nn.Module, dict[str, Any]]]:
    """The denoisers of an opened pipeline by component, with the descriptions in its files."""
    found = read_descriptions(directory)
    if dequantized.ONLY in found:
        found = {next(iter(find_denoisers(pipeline))): found[dequantized.ONLY]}
    return [(name, getattr(pipeline, name), description) for name, description in found.items()]
