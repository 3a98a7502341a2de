"""Fréchet distance between two sets of images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric
from fpq_lightning.utils import distributed

_STATES = ("features_sum", "features_cov_sum", "features_num_samples")
_FEW_IMAGES = 2000


class _Features(nn.Identity):
    """Takes the place of the feature network that torchmetrics expects: the metric is given features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class FrechetDistance(FrechetInceptionDistance):
    """Fréchet distance (Heusel et al. 2017, arXiv 1706.08500) between the features of two sets of images.

    Args:
        num_features: width of the features.

    Example:
        >>> import torch
        >>> metric = FrechetDistance(1)
        >>> metric.update(torch.tensor([[0.0], [2.0]]), real=True)  # mean 1
        >>> metric.update(torch.tensor([[3.0], [5.0]]), real=False)  # mean 4, the same variance
        >>> round(metric.compute().item(), 3)
        9.0
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(feature=_Features(num_features), reset_real_features=False)

    def compute(self) -> Tensor:
        """The distance; rounding errors can make that of two equal sets negative, which is cut off."""
        return super().compute().clamp(min=0)

    def save_statistics(self, file: str | Path, network: str = "") -> None:
        """Writes the sums that describe the reference images.

        Args:
            file: a safetensors file.
            network: name of the feature network, which `load_statistics` compares.
        """
        save_file({name: getattr(self, f"real_{name}").cpu() for name in _STATES}, file, {"network": network})

    def load_statistics(self, file: str | Path, network: str = "") -> None:
        """Reads the reference images' statistics that `save_statistics` wrote.

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
        if distributed.rank() == 0:  # the sums of all processes are added up
            for name, value in values.items():
                setattr(self, f"real_{name}", value.to(self.device))


def _few_images(n_images: int) -> str:
    note = "Metrics that do not name Inception use the configured feature network."
    if n_images < _FEW_IMAGES:
        note += (
            f" Fréchet distances of {n_images} images only rank the variants; they are not comparable with figures of "
            "other sample counts."
        )
    return note


_FD = ImageMetric(
    name="fd",
    help="Fréchet distance on the configured feature network.",
    columns=(Column("fd", "FD", 3, plot="log"),),
    inputs=("pooled",),
    make=lambda network: FrechetDistance(network.num_features),
    network="features",
    against="full_precision",
    pinned=True,
    note=_few_images,
)
_FID = replace(
    _FD,
    name="fid",
    help="Fréchet Inception distance.",
    columns=(Column("fid", "FID", 2),),
    network="inception",
    pinned=False,
    note=lambda n_images: "FID follows the published convention: images resized without antialiasing.",
)
_SFID = replace(
    _FID,
    name="sfid",
    help="Fréchet distance on spatial Inception features (Nash et al. 2021, arXiv 2103.03841).",
    columns=(Column("sfid", "sFID", 2),),
    inputs=("spatial",),
    make=lambda network: FrechetDistance(network.num_spatial_features),
    note=None,
)
for _metric in (_FD, _FID, _SFID):
    METRICS.register(_metric)
    METRICS.register(_metric.to_real(Column(f"{_metric.name}_real", f"{_metric.columns[0].title} to real", 2)))
