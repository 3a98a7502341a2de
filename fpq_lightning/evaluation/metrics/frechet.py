"""Fréchet distance between two sets of images."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from fpq_lightning.utils import distributed

_STATES = ("features_sum", "features_cov_sum", "features_num_samples")


class FrechetDistance(FrechetInceptionDistance):
    """Fréchet distance (Heusel et al. 2017) on any feature network that takes images in [-1, 1]."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__(feature=features, reset_real_features=False)

    def compute(self) -> Tensor:
        """The distance; rounding may have made that of two equal sets negative."""
        return super().compute().clamp(min=0)

    def save_statistics(self, file: str | Path, network: str = "") -> None:
        """Writes the sums that describe the reference images.

        Args:
            file: to write, safetensors.
            network: name of the feature network, which `load_statistics` compares.
        """
        save_file({name: getattr(self, f"real_{name}").cpu() for name in _STATES}, file, {"network": network})

    def load_statistics(self, file: str | Path, network: str = "") -> None:
        """Takes reference images from what `save_statistics` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds something else, or statistics of another network.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no statistics file {file}: correct evaluation.real or set it to null")
        with safe_open(file, "pt") as opened:
            made_with = (opened.metadata() or {}).get("network", "")
        if made_with and network and made_with != network:
            raise ValueError(f"the statistics in {file} are of {made_with}, not of {network}: make them anew")
        values = load_file(file)
        shapes = {name: tuple(getattr(self, f"real_{name}").shape) for name in _STATES}
        if {name: tuple(values[name].shape) for name in _STATES if name in values} != shapes:
            raise ValueError(f"{file} holds no statistics of {len(self.real_features_sum)} features: make them anew")
        if distributed.rank() == 0:  # the processes' sums are added up
            for name, value in values.items():
                setattr(self, f"real_{name}", value.to(self.device))
