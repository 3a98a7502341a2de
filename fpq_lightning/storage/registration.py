"""Registers the quantizers with diffusers and transformers, without importing either.

`import fpq_lightning` must make `from_pretrained` open packed models, but these libraries and torch take seconds to
import and the command line's help needs none. So the quantizers are registered right after the first library has made
its list of quantizers, which every `from_pretrained` imports. The models of diffusers import transformers as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_LISTS = ("diffusers.quantizers.auto", "transformers.quantizers.auto")
_QUANTIZERS = (  # register themselves when they are imported
    "fpq_lightning.storage.diffusers_quantizer",
    "fpq_lightning.storage.transformers_quantizer",
)
_CONFIG = "fpq_lightning.storage.config"  # which they need


class _AfterAList(MetaPathFinder):
    """Imports the quantizers after the first of the lists, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _LISTS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Imports the quantizers, unless their configuration is being imported, which calls this at its end."""
    config = sys.modules.get(_CONFIG)
    if config is None or hasattr(config, "FPQConfig"):
        for quantizer in _QUANTIZERS:
            import_module(quantizer)


def register_when_imported() -> None:
    """Registers the quantizers now if a library has its list already, otherwise as soon as one has."""
    if any(listed in sys.modules for listed in _LISTS):
        register()
    else:
        sys.meta_path.insert(0, _AfterAList())
