"""Pipelines of the tests of diffusers: their components and inputs, given a checkout of diffusers.

What these tests load from the hub is made by `tiny_hub.py`.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import datasets
import diffusers
import numpy as np
import torch
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_cosmos
from PIL import Image
from tiny_hub import tiny_hub
from tiny_pipelines import LETTERS, Made
from torch import Tensor, nn
from transformers import PreTrainedModel

_DECIDED = ("prompt", "generator", "output_type", "return_dict", "batch_size")  # by the sampler
_OPTIONS = {"num_inference_steps": "steps", "guidance_scale": "guidance_scale", "height": "height", "width": "width"}
_TRANSFORMS = SimpleNamespace(  # what Cosmos uses of torchvision, where that is not installed
    InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    functional=SimpleNamespace(
        resize=lambda x, size, interpolation: nn.functional.interpolate(x, size, mode=interpolation)
    ),
)
_ABSENT = ("parameterized", "requests_mock")  # modules of other tests in the same files


@dataclass(frozen=True)
class PipelineTest:
    """A test of a pipeline of diffusers.

    Attributes:
        pipeline: its class.
        checkout: of diffusers.
        module: of the test.
        name: of the class in it.
    """

    pipeline: str
    checkout: Path
    module: str
    name: str

    def run(self) -> None:
        """Calls the pipeline as the test does."""
        components, inputs, _ = self._made()
        pipeline = getattr(diffusers, self.pipeline)(**components)
        pipeline.set_progress_bar_config(disable=True)
        pipeline(**inputs)

    def make(self) -> Made:
        """The components of the pipeline, and the options of its sampler."""
        components, inputs, batched = self._made()
        folder = self.module.rpartition(".")[0]
        for kind in map(type, components.values()):  # one of the test is opened from the folder that diffusers expects
            if kind.__module__.rpartition(".")[0] == folder:
                setattr(getattr(diffusers.pipelines, folder.rpartition(".")[2]), kind.__name__, kind)
        for network in (part for part in components.values() if isinstance(part, nn.Module)):
            network.eval()
            if next(network.parameters(), None) is None:  # diffusers opens no files without weights
                _give_weight(type(network))
                network.register_parameter("weight", nn.Parameter(torch.ones(1)))
            text = network.config.get_text_config() if isinstance(network, PreTrainedModel) else None
            if getattr(text, "vocab_size", len(LETTERS)) < len(LETTERS):
                network.resize_token_embeddings(len(LETTERS))
            for parameter in network.parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
        call = inspect.signature(getattr(diffusers, self.pipeline).__call__).parameters
        return components, _options(call, inputs, batched)

    def _made(self) -> tuple[dict[str, Any], dict[str, Any], Collection[str]]:
        if str(self.checkout) not in sys.path:
            sys.path.insert(0, str(self.checkout))
        for module in _ABSENT:
            sys.modules.setdefault(module, mock.MagicMock())
        home = sys.modules[getattr(diffusers, self.pipeline).__module__]
        vars(home).setdefault("ftfy", SimpleNamespace(fix_text=str))  # repairs prompts, where it is installed
        for user in (controlnet_cosmos, transformer_cosmos):
            vars(user).setdefault("transforms", _TRANSFORMS)
        test = getattr(importlib.import_module(self.module), self.name)()
        with tiny_hub():
            components = test.get_dummy_components()
            takes_device = "device" in inspect.signature(test.get_dummy_inputs).parameters
            inputs = test.get_dummy_inputs(*["cpu"] * takes_device)
        named = [getattr(type(test), name, None) for name in ("batch_params", "batch_input_params")]
        return components, inputs, next((names for names in named if isinstance(names, (frozenset, list, tuple))), ())


def pipeline_tests(checkout: Path) -> dict[str, PipelineTest]:
    """The tests in a checkout of diffusers by the class of the pipeline, if diffusers has it."""
    found: dict[str, PipelineTest] = {}
    for file in sorted((checkout / "tests" / "pipelines").rglob("test_*.py")):
        module = ".".join(file.relative_to(checkout).with_suffix("").parts)
        classes = {node.name: node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)}
        for node in classes.values():
            above = [classes[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
            name = next(filter(None, map(_pipeline_of, [node, *above])), "")
            kind = getattr(diffusers, name, None)
            if _makes_components(node) and inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline):
                found.setdefault(name, PipelineTest(name, checkout, module, node.name))
    return found


def _makes_components(node: ast.ClassDef) -> bool:
    """Whether a class makes components without being told which."""
    made = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "get_dummy_components"]
    return any(len(f.args.args) == 1 + len(f.args.defaults) for f in made)


def _pipeline_of(node: ast.ClassDef) -> str:
    """The name of the pipeline that a class tests, without the wrappers of tests."""
    assigned = [part for part in node.body if isinstance(part, ast.Assign)]
    of = [part.value for part in assigned if ast.unparse(part.targets[0]) == "pipeline_class"]
    return ast.unparse(of[0]).removesuffix("Wrapper").removesuffix("Pipeline") + "Pipeline" if of else ""


def _give_weight(kind: type[nn.Module]) -> None:
    """Lets models of a class have a weight."""
    make = kind.__init__

    @functools.wraps(make)
    def making(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.register_parameter("weight", nn.Parameter(torch.ones(1)))

    kind.__init__ = making  # type: ignore[method-assign]


def _options(call: Mapping[str, inspect.Parameter], inputs: dict[str, Any], batched: Collection[str]) -> dict[str, Any]:
    """The options of a sampler that calls a pipeline with such inputs.

    Args:
        call: parameters of the pipeline.
        inputs: of one image.
        batched: names of those that are lists for several images.
    """
    prompt = inputs.get("prompt")
    is_plain = isinstance(prompt, str) and not prompt.startswith("{")
    options: dict[str, Any] = {} if is_plain else {"prompts": None if prompt is None else [prompt]}
    columns: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for name, value in inputs.items():
        if name in _DECIDED or name not in call or (value is None and call[name].default is None):
            continue
        if name in _OPTIONS and value is not None:
            options[_OPTIONS[name]] = value
        elif name == "negative_prompt" and isinstance(value, str):
            options[name] = value
        elif _is_of_image(value) or (name in batched and isinstance(value, str)):
            columns[name] = [_of_one(value, i) for i in range(3)]
        else:
            arguments[name] = list(value) if isinstance(value, tuple) else value
    if columns:
        options["inputs"] = datasets.Dataset.from_dict(columns)
    return options | {"arguments": arguments}


def _is_of_image(value: Any) -> bool:
    """Whether each image has one of its own."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, (Image.Image, Tensor, np.ndarray))


def _of_one(value: Any, i: int) -> Any:
    """The value of image i, without the axis of a batch; a mask is a picture, and pictures are noise."""
    if isinstance(value, list):
        return _of_one(value[0], i) if len(value) == 1 else [_of_one(part, i) for part in value]
    if isinstance(value, Image.Image):
        return Image.effect_noise(value.size, 40 + i).convert(value.mode)
    if not isinstance(value, (Tensor, np.ndarray)):
        return value
    value = torch.as_tensor(value)
    if value.ndim == 2 and ((value == 0) | (value == 1)).all():
        return Image.fromarray(value.mul(255).to(torch.uint8).numpy())
    return (value[0] if len(value) == 1 else value).tolist()
