"""Arithmetic of packed layers, one path a file; all are imported, and register themselves."""

from __future__ import annotations

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)
