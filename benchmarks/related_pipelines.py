"""Pipelines of diffusers that are made of the parts of a tiny one: image to image, inpainting, other guidance, ..."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
from tiny_pipelines import PIPELINES, Made, picture, rows

_NETWORKS = ("unet", "transformer", "transformer_2", "prior", "decoder", "controlnet")
_PICTURES = ("image", "mask_image", "control_image")
_TAKES_PICTURES = ("Img2Img", "Inpaint", "Edit", "ImageToVideo", "I2V", "I2I", "Control", "Instruct", "Variation")


def related() -> dict[str, str]:
    """By the class of a pipeline, the tiny pipeline whose parts it takes; not those of `PIPELINES` themselves."""
    bases = {name.split()[0]: name for name in PIPELINES}
    found = {}
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None) if name.endswith("Pipeline") and "Modular" not in name else None
        if not inspect.isclass(kind) or name in bases or "deprecated" in kind.__module__ or "dummy" in kind.__module__:
            continue
        if not issubclass(kind, diffusers.DiffusionPipeline) or kind is diffusers.DiffusionPipeline:
            continue
        fitting = [base for base in bases if _fits(kind, getattr(diffusers, base))]
        if fitting:  # the one that has most in common by name
            found[name] = bases[max(fitting, key=lambda base: (_common(name, base), -len(base)))]
    return found


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    return {k: p for k, p in inspect.signature(kind.__init__).parameters.items() if k != "self"}


def _fits(kind: type, base: type) -> bool:
    """Whether a pipeline needs nothing that the base lacks, and has the same networks."""
    own, given = _parameters(kind), _parameters(base)
    needed = {k for k, p in own.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    networks = [k for k in _NETWORKS if k in own]
    same = all(k in given and own[k].annotation == given[k].annotation for k in networks)
    return needed <= given.keys() and bool(networks) and same


def _common(name: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(name, other, strict=False)) if a != b), min(len(name), len(other)))


def make_related(name: str, base: str) -> Made:
    """The components of a pipeline, and the options of its sampler."""
    components, options = PIPELINES[base]()
    kind = getattr(diffusers, name)
    accepted, call = _parameters(kind), inspect.signature(kind.__call__).parameters
    components = {k: v for k, v in components.items() if k in accepted}
    wanted = [
        picked
        for picked in _PICTURES
        if picked in call and (call[picked].default is inspect.Parameter.empty or _takes_pictures(name, picked, call))
    ]
    made: dict[str, Any] = {
        **options,
        "arguments": {k: v for k, v in options.get("arguments", {}).items() if k in call},
    }
    made.pop("inputs", None)
    if wanted:
        made |= {"inputs": rows(**dict.fromkeys(wanted, picture)), "steps": 4}
    if "prompt" not in call:
        made["prompts"] = None
    return components, {k: v for k, v in made.items() if k not in ("height", "width") or k in call}


def _takes_pictures(name: str, picked: str, call: Any) -> bool:
    return call[picked].default is None and any(word in name for word in _TAKES_PICTURES)
