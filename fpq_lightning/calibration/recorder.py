"""What denoisers are called with while their pipeline samples."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fpq_lightning.diffusion.processors import attention_processors
from fpq_lightning.graph.tree import output_leaves

PLAIN = (bool, int, float, str, type(None))
_CONTAINERS = (dict, OrderedDict, list, tuple, torch.Size)


@dataclass
class Call:
    """One call of a denoiser.

    Attributes:
        arguments: its keyword arguments as they came in.
        output: the floating-point tensors that it gave.
        finite: whether all that it gave is finite.
        sensitivity: how strongly the scheduler passes an error of each guidance pass on to each image,
            `[passes, images]`; NaN if it cannot be measured, None if it was not to be.
    """

    arguments: dict[str, Any]
    output: list[Tensor] = field(default_factory=list)
    finite: bool = True
    sensitivity: Tensor | None = None


class Recorder:
    """Records the calls of a pipeline's denoisers.

    Args:
        pipeline: it samples within the context.
        denoisers: by name.
        on_step: takes the calls of each denoiser, by name, since the last step of a scheduler, and the scheduler that
            makes a step now; None for the calls that no step followed. An exception of it ends sampling.
        measures: whether the sensitivity of the scheduler is measured.

    Attributes:
        images: of the batch that is sampled.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        denoisers: Mapping[str, nn.Module],
        on_step: Callable[[dict[str, list[Call]], Any], None],
        measures: bool = False,
    ) -> None:
        schedulers = [c for c in pipeline.components.values() if callable(getattr(c, "step", None))]
        self.schedulers = list({id(c): c for c in schedulers}.values())  # of several pipelines in one, each has its own
        self.denoisers = denoisers
        self.on_step, self.measures = on_step, measures
        self.images = 1
        self._processors: dict[str, dict[int, Any]] = {name: {} for name in denoisers}  # in calls, by identity
        self._pending: dict[str, list[Call]] = {}
        self._warned = False

    def __enter__(self) -> Recorder:
        self._handles = []
        for name, denoiser in self.denoisers.items():
            self._handles.append(denoiser.register_forward_pre_hook(partial(self._before, name), with_kwargs=True))
            self._handles.append(denoiser.register_forward_hook(partial(self._after, name)))
        for scheduler in self.schedulers:
            scheduler.step = partial(self._measured_step, scheduler, scheduler.step)
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        for scheduler in self.schedulers:
            vars(scheduler).pop("step", None)
        if error[0] is None:
            self.finish()

    def finish(self) -> None:
        """Hands over the calls that no step of a scheduler followed."""
        if self._pending:
            self._hand_over(None)

    def guest_processors(self, name: str) -> list[str]:
        """Classes of what computed attention in calls of a denoiser, but does not outside of its pipeline."""
        own = set(map(id, attention_processors(self.denoisers[name]).values()))
        return sorted({type(guest).__name__ for key, guest in self._processors[name].items() if key not in own})

    def _hand_over(self, scheduler: Any) -> None:
        pending, self._pending = self._pending, {}
        self.on_step(pending, scheduler)

    def _before(self, name: str, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._processors[name] |= {id(own): own for own in attention_processors(module).values()}
        arguments = bound_arguments(inspect.signature(type(module).forward), module, args, kwargs)
        paths = set()
        for path, leaf in _leaves("", arguments):
            if not isinstance(leaf, (Tensor, np.generic, *PLAIN)):
                raise ValueError(
                    f"{type(module).__name__} is called with {path}, of type {type(leaf).__name__}, which a "
                    "calibration set cannot keep: it takes tensors, numbers and strings, and dictionaries, lists and "
                    "tuples of them; call the pipeline without it"
                )
            if path in paths:
                raise ValueError(f"{type(module).__name__} is called with two inputs that are both {path}: rename one")
            paths.add(path)
        self._pending.setdefault(name, []).append(Call(tree_map(_copied, arguments)))

    def _after(self, name: str, module: Any, args: tuple, output: Any) -> None:
        call = self._pending[name][-1]
        # A pipeline may change it in place before the scheduler sees it.
        call.output = [x.detach().clone() for x in output_leaves(output)]
        call.finite = all(bool(x.isfinite().all()) for x in call.output)

    def _measured_step(self, scheduler: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.measures and self._pending:
            self._measure(scheduler, step, args, kwargs)
        self._hand_over(scheduler)
        return step(*args, **kwargs)

    def _measure(self, scheduler: Any, step: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
        calls = [call for some in self._pending.values() for call in some]
        if not all(call.finite for call in calls):  # such a network is refused
            return
        try:
            options = dict(inspect.signature(step).bind(*args, **kwargs).arguments)
            given = tuple(options.pop(name) for name in ("model_output", "timestep", "sample"))
            sensitivity = output_sensitivity(scheduler, given, options).reshape(self.images, -1).mean(1)
            # What another network reads, such as the residuals of a ControlNet, weighs like what that one predicts.
            predicted = [call for call in calls if _predicts(call, given[0])] or calls
            passes = [_rows(call.output).unflatten(0, (-1, len(given[0]))) for call in predicted]
            shares = guidance_shares([x for some in passes for x in some], given[0]).split([len(x) for x in passes])
            if not (sensitivity.isfinite().all() and all(share.isfinite().all() for share in shares)):
                raise ValueError("it comes out as NaN or Inf")
        except Exception as error:  # whatever a scheduler may do with what it is given: its steps go on without weights
            if not self._warned:
                reason = " ".join(str(error).split())[:150]
                warnings.warn(
                    f"how strongly {type(scheduler).__name__} passes errors on cannot be measured ({reason}): its "
                    "samples weigh alike",
                    stacklevel=2,
                )
            self._warned = True
            for call in calls:
                call.sensitivity = torch.full((1, self.images), torch.nan)
            return
        for call in calls:
            call.sensitivity = sensitivity[None]
        for call, share in zip(predicted, shares, strict=True):
            call.sensitivity = share[:, None] * sensitivity[None]


def _leaves(path: str, node: Any) -> Iterator[tuple[str, Any]]:
    """What a tree of arguments holds, with paths such as ``added_cond_kwargs/time_ids`` or ``images/0``."""
    if type(node) in _CONTAINERS:
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(f"{path}/{key}" if path else str(key), child)
    else:
        yield path, node


def _copied(leaf: Any) -> Any:
    """A leaf as it came in, whatever the network does to it."""
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    return leaf.item() if isinstance(leaf, np.generic) else leaf


def _predicts(call: Call, combined: Tensor) -> bool:
    """Whether a scheduler is given something made of the outputs of a call."""
    first = call.output[0] if call.output else combined[:0]
    shape = first.shape if len(call.output) == 1 else (len(call.output), *first.shape)
    return len(shape) == combined.ndim and shape[2:] == combined.shape[2:] and len(shape) > 1


def _rows(output: list[Tensor]) -> Tensor:
    """What a call gave for its images, whose outputs may be a list."""
    return output[0] if len(output) == 1 else torch.stack(output)


def bound_arguments(signature: inspect.Signature, module: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name.

    Raises:
        ValueError: if one has no name.
    """
    bound = signature.bind(module, *args, **kwargs).arguments
    named: dict[str, Any] = {}
    for position, (name, value) in enumerate(bound.items()):
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY) and position:
            if kind is inspect.Parameter.POSITIONAL_ONLY or value:
                raise ValueError(f"{type(module).__name__} takes {name} without a name, which cannot be recorded")
        elif position:
            named[name] = value
    return named


def output_sensitivity(scheduler: Any, arguments: tuple, options: dict[str, Any]) -> Tensor:
    """How strongly one scheduler step passes an error of the denoiser's output on to the sample, `[batch]`.

    It is a finite difference on a copy of the scheduler, so it works for any scheduler. Near the end of a trajectory
    there is little noise, so even a large relative error of its prediction changes the image little.
    """
    output, timestep, sample = arguments
    output, sample = output.float(), sample.float()  # half precision loses the difference
    options = dict(options)
    takes_generator = "generator" in inspect.signature(type(scheduler).step).parameters
    probe = output.std() * 1e-2
    probe = torch.where(probe > 0, probe, 1e-2)  # values that are all alike have none, and a single one has NaN
    stepped = []
    for shift in (0.0, probe):
        clone = copy.copy(scheduler)
        clone.__dict__ = copy.deepcopy({k: v for k, v in vars(scheduler).items() if k != "step"})
        if takes_generator:  # the same noise in both steps, should the scheduler draw any
            options["generator"] = torch.Generator("cpu").manual_seed(0)
        stepped.append(clone.step(output + shift, timestep, sample, **options))
    before, after = (s[0] if isinstance(s, tuple) else s.prev_sample for s in stepped)
    return ((after - before).flatten(1).square().mean(1).sqrt() / probe).cpu()


def guidance_shares(outputs: Sequence[Tensor], combined: Tensor) -> Tensor:
    """The absolute weights with which the guidance passes are combined, `[passes]`.

    Classifier-free guidance adds the passes up with weights 1 - g and g. Least squares finds the weights, so any
    guidance scheme works.

    Args:
        outputs: the denoiser's output for each pass, `[n, channels, ...]`.
        combined: the combination that the scheduler is given; it lacks the last channels if these predict a variance.
    """
    if len(outputs) == 1:
        return torch.ones(1)
    columns = torch.stack([x[:, : combined.shape[1]].flatten().double().cpu() for x in outputs], dim=1)
    if columns.shape[0] != combined.numel():
        return torch.ones(len(outputs))
    gram = columns.T @ columns
    return (torch.linalg.pinv(gram) @ columns.T @ combined.flatten().double().cpu()).abs().float()
