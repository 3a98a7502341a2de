"""What a denoiser is called with while its pipeline samples."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils._pytree import tree_map

from fpq_lightning.diffusion.pipelines import denoiser_name
from fpq_lightning.graph.tree import named_leaves, output_leaves

PLAIN = (bool, int, float, str, type(None))


@dataclass
class Call:
    """One call of the denoiser.

    Attributes:
        arguments: its keyword arguments as they came in.
        output: the floating-point tensors that it gave.
        sensitivity: how strongly the scheduler passes an error of each guidance pass on to each image,
            `[passes, images]`; None if it was not measured.
    """

    arguments: dict[str, Any]
    output: list[Tensor] = field(default_factory=list)
    sensitivity: Tensor | None = None


class Enough(Exception):  # noqa: N818
    """Ends sampling once all is known that was asked for."""


class Recorder:
    """Records the calls of a pipeline's denoiser.

    Args:
        pipeline: it samples within the context.
        on_call: takes each call when it is complete: at the step of the scheduler after it, or at the end.
        measures: whether the sensitivity of the scheduler is measured.
        one_step: whether sampling ends, with `Enough`, at the first step of the scheduler.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        on_call: Callable[[Call], None],
        measures: bool = False,
        one_step: bool = False,
    ) -> None:
        self.scheduler = getattr(pipeline, "scheduler", None)
        self.denoiser = getattr(pipeline, denoiser_name(pipeline))
        self.signature = inspect.signature(type(self.denoiser).forward)
        self.on_call, self.measures, self.one_step = on_call, measures, one_step
        self.images = 1  # of the batch that is sampled
        self._pending: list[Call] = []

    def __enter__(self) -> Recorder:
        self._handles = [
            self.denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            self.denoiser.register_forward_hook(self._after),
        ]
        if self.scheduler is not None:
            self._step = self.scheduler.step
            self.scheduler.step = self._measured_step
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        if self.scheduler is not None:
            vars(self.scheduler).pop("step", None)
        if error[0] is None:
            self.finish()

    def finish(self) -> None:
        """Hands over the calls that no step of the scheduler followed."""
        pending, self._pending = self._pending, []
        for call in pending:
            self.on_call(call)

    def _before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        arguments = bound_arguments(self.signature, module, args, kwargs)
        for path, leaf in named_leaves(arguments):
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise ValueError(
                    f"{type(module).__name__} is called with {path}, of type {type(leaf).__name__}, which a "
                    "calibration set cannot keep: it takes tensors, numbers and strings; call the pipeline without it"
                )
        # What the network changes in place is kept as it came in.
        copied = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, arguments)
        self._pending.append(Call(copied))

    def _after(self, module: Any, args: tuple, output: Any) -> None:
        self._pending[-1].output = [x.detach() for x in output_leaves(output)]

    def _measured_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.measures and self._pending:
            self._measure(args, kwargs)
        self.finish()
        if self.one_step:
            raise Enough
        return self._step(*args, **kwargs)

    def _measure(self, args: tuple, kwargs: dict[str, Any]) -> None:
        try:
            options = dict(inspect.signature(self._step).bind(*args, **kwargs).arguments)
            step = tuple(options.pop(name) for name in ("model_output", "timestep", "sample"))
            sensitivity = output_sensitivity(self.scheduler, step, options).reshape(self.images, -1).mean(1)
            passes = [_rows(call.output).unflatten(0, (-1, len(step[0]))) for call in self._pending]
            shares = guidance_shares([x for some in passes for x in some], step[0]).split([len(x) for x in passes])
        except Exception as error:  # whatever a scheduler may do with what it is given: its steps go on without weights
            reason = " ".join(str(error).split())[:150]
            warnings.warn(
                f"how strongly {type(self.scheduler).__name__} passes errors on cannot be measured ({reason}): its "
                "samples weigh alike",
                stacklevel=2,
            )
            self.measures = False
            return
        for call, share in zip(self._pending, shares, strict=True):
            call.sensitivity = share[:, None] * sensitivity[None]


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
    probe = torch.where(probe == 0, 1e-2, probe)
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
