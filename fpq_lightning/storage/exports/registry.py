"""The registry of exports: what each writes, and how its files are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from fpq_lightning.nn.attention import quantized_attention
from fpq_lightning.nn.convert import make_attention_plain, make_plain
from fpq_lightning.nn.packed_layer import packed_layers
from fpq_lightning.storage.opened import forget_config
from fpq_lightning.utils.registry import Registry


@dataclass(frozen=True)
class Export:
    """A form in which a quantized pipeline is written.

    Attributes:
        name: for ``fpq export --format``.
        help: one line for the command line.
        usage: how to use the files, for their README.
        convert: gives a pipeline, whose denoisers are packed, the form in which `save_pretrained` then
            writes it, in place. Takes the pipeline, where it comes from (``base_model``, ``recipe``, ``version``,
            ``fingerprint``; see `details_of`), and the directory, for further files.
        needs_codes: whether the weights of the dequantized form must be turned into codes first.
    """

    name: str
    help: str
    usage: str
    convert: Callable[[DiffusionPipeline, Mapping[str, Any], Path], None]
    needs_codes: bool = True


EXPORTS: Registry[Export] = Registry("export format")


def details_of(details: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What is known of one denoiser, where the details of several hold entries of each under ``denoisers``."""
    shared = {key: value for key, value in details.items() if key != "denoisers"}
    return {**shared, **details.get("denoisers", {}).get(name, {})}


def export_help() -> str:
    """One line on all exports."""
    return "; ".join(f"{export.name}: {export.help}" for export in EXPORTS)


def make_pipeline_plain(pipeline: DiffusionPipeline) -> None:
    """Turns all packed layers and attention of a pipeline into plain classes, with float32 weights."""
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            layers, attention = packed_layers(component), quantized_attention(component)
            if layers or attention:
                forget_config(component)
            for layer in layers.values():
                make_plain(layer)
            for module in attention.values():
                make_attention_plain(module)
