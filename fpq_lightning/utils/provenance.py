"""What a result depends on: versions, device, and a fingerprint of options."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

import torch

PACKAGES = ("fpq-lightning", "torch", "lightning", "diffusers", "torchmetrics", "datasets")


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {name: version(name) for name in PACKAGES}


def device_name(device: torch.device) -> str:
    """The name of a device in reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def fingerprint(parts: dict[str, Any]) -> str:
    """A short hash of plain values."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()
