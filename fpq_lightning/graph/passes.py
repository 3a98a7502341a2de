"""Forward passes that are only watched: of shapes alone where a network allows it, which take no memory and no time."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_map

from fpq_lightning.graph.offload import Offload


class Passes:
    """Forward passes of a network."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def runs_as(self, module: nn.Module) -> nn.Module:
        """The module whose hooks are called when a module of the network runs."""
        return module

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any]) -> None:
        """Runs the network.

        Args:
            inputs: its keyword arguments.
        """
        with torch.compiler.set_stance("force_eager"):  # what compiles itself, as flex attention does
            self.model(**inputs)


class ShapePasses(Passes):
    """Forward passes of a copy of a network whose tensors have shapes and types, but no values.

    A pass raises an error if the network needs values, or if the copy calls modules of the network itself. What
    modules and functions keep of a pass is lost with the copy, or forgotten.
    """

    def __init__(self, model: nn.Module) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        tensors = {id(x): self._mode.from_tensor(x) for x in chain(model.parameters(), model.buffers())}
        hooks = {id(kept): _others(kept) for module in model.modules() for kept in _hooks(module)}
        self._copies: dict[int, Any] = tensors | hooks
        self._own = set(model.modules())
        self._caches = [x for x in gc.get_objects() if type(x) is functools._lru_cache_wrapper]  # found nowhere else
        super().__init__(copy.deepcopy(model, self._copies))

    def runs_as(self, module: nn.Module) -> nn.Module:
        """The copy of the module."""
        return self._copies[id(module)]

    def __call__(self, inputs: Mapping[str, Any]) -> None:
        faked = tree_map(lambda x: self._mode.from_tensor(x) if isinstance(x, Tensor) else x, dict(inputs))
        handle = register_module_forward_pre_hook(self._check_copied)
        try:
            with _forgetting(self._caches), self._mode:
                super().__call__(faked)
        finally:
            handle.remove()

    def _check_copied(self, module: nn.Module, args: Any) -> None:
        if module in self._own:  # as a function that was assigned to `forward` may
            raise RuntimeError("the copy of the network calls modules of the network")


def _hooks(module: nn.Module) -> Iterator[dict[int, Any]]:
    """The dictionaries that hold what is called before and after a forward."""
    return (kept for name, kept in vars(module).items() if name in ("_forward_hooks", "_forward_pre_hooks"))


def _others(hooks: dict[int, Any]) -> dict[int, Any]:
    """Hooks without those that move weights, which a copy has none of."""

    def owner(hook: Any) -> Any:
        return getattr(hook.func if isinstance(hook, functools.partial) else hook, "__self__", None)

    return type(hooks)((key, hook) for key, hook in hooks.items() if not isinstance(owner(hook), Offload))


@contextmanager
def _forgetting(caches: list[Any]) -> Iterator[None]:
    """Empties those caches of functions that are filled within the block: they may hold tensors without values."""
    before = [cache.cache_info().misses for cache in caches]
    try:
        yield
    finally:
        for cache, misses in zip(caches, before, strict=True):
            if cache.cache_info().misses != misses:
                cache.cache_clear()
