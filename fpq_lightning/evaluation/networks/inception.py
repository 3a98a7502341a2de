"""The Inception network of FID, which needs the extra ``fid`` and its published weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3
from torchmetrics.utilities.imports import _TORCH_FIDELITY_AVAILABLE

from fpq_lightning.diffusion.media import to_bytes
from fpq_lightning.evaluation.networks.network import FeatureNetwork


class InceptionNetwork(FeatureNetwork):
    """Inception-v3 in the conversion that FID is published with; images are resized without antialiasing.

    Args:
        weights: file of the converted weights; None takes them from torch-fidelity's cache, or downloads them.

    Raises:
        ModuleNotFoundError: if torch-fidelity, which has the network, is not installed.
        FileNotFoundError: if there are no weights.
    """

    name = "inception"
    num_features = 2048
    num_spatial_features = 2023

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        if not _TORCH_FIDELITY_AVAILABLE:
            raise ModuleNotFoundError("install fpq-lightning[fid] for the network of FID")
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"there are no Inception weights {weights}: correct evaluation.inception")
        try:
            self.network = NoTrainInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                None if weights is None else str(weights),
                antialias=False,
            )
        except OSError as error:  # URLError is one
            raise FileNotFoundError(
                f"the Inception weights can not be fetched ({error}): name a file with evaluation.inception"
            ) from error
        self.requires_grad_(False)
        self._spatial: Tensor | None = None
        # mixed_6/conv of the original graph, whose first seven channels are the features of sFID (Nash et al. 2021).
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._spatial = output[:, :7].flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Features `[n, 2048]` of images `[n, 3, height, width]` in [-1, 1]."""
        return self.describe(images)["pooled"]

    @torch.no_grad()
    def describe(self, images: Tensor) -> dict[str, Tensor]:
        """``pooled`` `[n, 2048]`, ``logits`` `[n, 1008]` and ``spatial`` `[n, 2023]`."""
        pooled, logits = self.network._torch_fidelity_forward(to_bytes(images))
        assert self._spatial is not None
        return {"pooled": pooled, "logits": logits, "spatial": self._spatial}
