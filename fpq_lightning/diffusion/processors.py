"""Attention processors: what computes attention for the modules of networks of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn


def attention_processors(network: nn.Module) -> dict[nn.Module, Any]:
    """The processor of each module of a network that has one."""
    return {m: m.processor for m in network.modules() if callable(getattr(m, "processor", None))}


@contextmanager
def kept_if_interrupted(pipeline: DiffusionPipeline) -> Iterator[None]:
    """If an exception ends the block, the networks of a pipeline get back the processors that they had before it.

    Pipelines with a guidance that changes attention set others for the time of a call, and undo that at its end only.
    """
    networks = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    before = [attention_processors(network) for network in networks]
    try:
        yield
    except BaseException:
        for module, own in (pair for processors in before for pair in processors.items()):
            if module.processor is not own:
                module._modules.pop("processor", None)  # torch takes no plain object in the place of a module
                module.processor = own
        raise
