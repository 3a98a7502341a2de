"""Where the weights of the networks that metrics run on are found, without loading them."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from fpq_lightning.utils.resources import FEATURES, find_features

_CHECKPOINTS = {  # in the cache of torch.hub, by the names that torch-fidelity and torchvision give them
    "Inception (FID)": "weights-inception-2015-12-05-6726825d.pth",
    "LPIPS alex": "alexnet-owt-7be5be79.pth",
    "LPIPS vgg": "vgg16-397923af.pth",
    "LPIPS squeeze": "squeezenet1_1-b8a52dc0.pth",
}


def find_weights() -> dict[str, Path | None]:
    """The file or directory of each network; None for one that would have to be downloaded."""
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    places = {f"features (FD, {FEATURES})": Path(find_features(FEATURES))}
    places |= {name: checkpoints / file for name, file in _CHECKPOINTS.items()}
    found = {name: path if path.exists() else None for name, path in places.items()}
    clip = sorted(path for path in Path(HF_HUB_CACHE).glob("models--*") if "clip" in path.name.lower())
    models: dict[str, Path | None] = {f"CLIP {path.name.split('--', 1)[1]}": path for path in clip}
    return {**found, **(models or {"CLIP": None})}
