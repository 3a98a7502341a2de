"""Registers the quantizer with diffusers, without importing diffusers.

`import fpq_lightning` must make `from_pretrained` open packed models, but diffusers and torch take seconds to import
and the command line's help needs neither. So the quantizer is registered right after diffusers has made its list of
quantizers, which every `from_pretrained` imports.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_LIST = "diffusers.quantizers.auto"
_QUANTIZER = "fpq_lightning.storage.diffusers_quantizer"  # registers itself when it is imported


class _AfterTheList(MetaPathFinder):
    """Imports the quantizer after diffusers' list, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _LIST:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            import_module(_QUANTIZER)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Registers the quantizer now if diffusers has its list already, otherwise as soon as it has."""
    if _LIST in sys.modules:
        import_module(_QUANTIZER)
    else:
        sys.meta_path.insert(0, _AfterTheList())
