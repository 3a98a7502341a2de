"""The networks of a pipeline that are called along the trajectory."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

from diffusers import DiffusionPipeline
from torch import nn

from fpq_lightning.nn.swap import SwappedModule

_NAMES = ("transformer", "unet", "prior", "decoder")
"""What diffusers calls a pipeline's only denoiser; a few of them take no time, or one of another name."""

_TIMES = ("t", "timestep", "timesteps", "timestep_ratio")


def may_denoise(name: str, kind: type | None) -> bool:
    """Whether a component is called along the trajectory, as far as its name and class tell.

    Args:
        name: of the component.
        kind: its class; None if it is not known.
    """
    return name in _NAMES or (kind is not None and _takes_time(kind))


def _takes_time(kind: type) -> bool:
    forward = getattr(kind, "forward", None)
    return forward is not None and any(name in _TIMES for name in inspect.signature(forward).parameters)


def _kind(component: nn.Module) -> type:
    """The class of a component, also of one that is compiled."""
    return type(getattr(component, "_orig_mod", component))


def _is_control(name: str, kind: type) -> bool:
    """Whether a network steers another one, which alone predicts: a ControlNet is quantized only if it is named."""
    return name not in _NAMES and "controlnet" in f"{name} {kind.__name__}".lower()


def candidates(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """All networks of a pipeline that may be called along the trajectory, by component; one of two names has one."""
    found: dict[str, nn.Module] = {}
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and may_denoise(name, _kind(component)):
            found |= {} if any(component is known for known in found.values()) else {name: component}
    return found


def find_denoisers(pipeline: DiffusionPipeline, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by component.

    Args:
        pipeline: a diffusers pipeline.
        names: the components that are asked for; None takes all but ControlNets.

    Raises:
        ValueError: if there are none, or a component that is asked for is no denoiser.
    """
    found, kind = candidates(pipeline), type(pipeline).__name__
    if names is None:
        chosen = {name: module for name, module in found.items() if not _is_control(name, _kind(module))}
        if not chosen:
            raise ValueError(f"{kind} has no denoiser: no component takes a timestep or is called {', '.join(_NAMES)}")
        return chosen
    for name in names:
        if name not in found:
            raise ValueError(
                f"recipe.denoisers names {name}, which is no denoiser of {kind}: choose among {', '.join(found)}"
            )
        if not hasattr(found[name], "register_to_config"):
            raise ValueError(
                f"recipe.denoisers names {name}, a {type(found[name]).__name__}, which has no configuration that could "
                "describe its packed files: leave it out"
            )
    return {name: module for name, module in found.items() if name in names}


def quantized_denoisers(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The denoisers of a pipeline that hold quantized modules, by component; those of `find_denoisers` if none does."""
    found = {
        name: module
        for name, module in candidates(pipeline).items()
        if any(isinstance(part, SwappedModule) for part in module.modules())
    }
    return found or find_denoisers(pipeline)


def as_one(denoisers: Mapping[str, nn.Module]) -> nn.Module:
    """One network of all: the only one, or one in which names begin with that of the component."""
    return next(iter(denoisers.values())) if len(denoisers) == 1 else nn.ModuleDict(dict(denoisers))
