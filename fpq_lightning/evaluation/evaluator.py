"""Judging images by the configured metrics."""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpq_lightning.diffusion.images import load_images, read_images
from fpq_lightning.diffusion.sampling import SamplerConfig
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.evaluation.networks.cifar10 import CIFAR10Network
from fpq_lightning.evaluation.networks.inception import InceptionNetwork
from fpq_lightning.evaluation.networks.network import FeatureNetwork, Features
from fpq_lightning.evaluation.quality import QualityMetrics, warn_left_out
from fpq_lightning.evaluation.sampling import share
from fpq_lightning.utils import distributed
from fpq_lightning.utils.places import check_writable
from fpq_lightning.utils.resources import find_features
from fpq_lightning.utils.tf32 import using_tf32

_BATCH = 250


class Evaluator:
    """Compares images with full-precision and real ones; opens what that needs once for all variants.

    Args:
        config: what quality is measured on.
        sampler: how images are sampled; its prompts are those of the images.
    """

    def __init__(self, config: EvaluationConfig, sampler: SamplerConfig) -> None:
        self.config = config
        self.sampler = sampler
        self._real: dict[str, Features] = {}  # this process's share, by network

    def check(self) -> None:
        """Opens everything that evaluation will need, so that a mistake is found before hours are spent.

        Warns if a network is left out, or if there are too few images for it.

        Raises:
            FileNotFoundError: if prompts, a feature network or real images are missing.
            ValueError: if a configured file or directory is missing or cannot be used.
        """
        self.sampler.check()
        config = self.config
        if config.inception not in (None, "auto") and not Path(str(config.inception)).is_file():
            raise ValueError(f"there are no Inception weights {config.inception}: correct evaluation.inception")
        if config.clip is not None and config.clip.count("/") != 1 and not Path(config.clip).is_dir():
            raise ValueError(f"there is no CLIP model {config.clip}: correct evaluation.clip")
        if config.real_statistics is not None and not Path(config.real_statistics).is_file():
            raise ValueError(
                f"there is no statistics file {config.real_statistics}: correct evaluation.real or set it to null"
            )
        if config.features is not None:
            CIFAR10Network.load(find_features(config.features))
        if not config.n_images:
            return
        if config.images is not None:
            check_writable(config.images, "evaluation.images")
        for network in self.networks.values():
            width = network.num_features
            if config.n_images <= width and distributed.rank() == 0:
                warnings.warn(
                    f"{config.n_images} images are too few for the covariance of the {width} features of "
                    f"{network.name} (at least {width + 1}): such Fréchet distances only rank sets of this size",
                    stacklevel=1,  # so that it is shown once, whoever checks
                )
        if config.real_images is not None:
            load_images(config.real_images, config.real_column)

    @cached_property
    def networks(self) -> dict[str, FeatureNetwork]:
        """Feature networks by the option that configures them."""
        networks: dict[str, FeatureNetwork] = {}
        if self.config.features is not None:
            networks["features"] = CIFAR10Network.load(find_features(self.config.features))
        if self.config.inception is not None:
            weights = None if self.config.inception == "auto" else self.config.inception
            try:
                networks["inception"] = InceptionNetwork(weights)
            except (ModuleNotFoundError, FileNotFoundError) as error:
                warn_left_out("metrics on Inception features are", error)
        return networks

    def metrics(self, device: torch.device) -> QualityMetrics:
        """Fresh metrics on a device.

        Raises:
            ValueError: if a real image cannot be read and `corrupt` is ``fail``.
        """
        for name, network in self.networks.items():
            network.to(device)
            if self.config.real_images is not None and name not in self._real:
                self._real[name] = self._describe_real(network, self.config.real_images, device)
        return QualityMetrics(self.config, self.networks, self._real).to(device)

    @torch.no_grad()
    def _describe_real(self, network: FeatureNetwork, source: str, device: torch.device) -> Features:
        dataset = load_images(source, self.config.real_column)
        count = len(dataset) if self.config.n_real is None else min(self.config.n_real, len(dataset))
        rows = range(distributed.rank(), count, distributed.world_size())
        with using_tf32(False):
            found = [
                {name: value.cpu() for name, value in network.describe(batch.to(device)).items()}
                for batch in read_images(dataset, self.config.real_column, rows, _BATCH, self.config.corrupt)
            ]
        counts = distributed.all_gather_objects(sum(len(batch["pooled"]) for batch in found))
        if sum(counts) < 2 or not min(counts):
            raise ValueError(f"{source} has {sum(counts)} images that can be read: too few")
        return {name: torch.cat([batch[name] for batch in found]).to(device) for name in found[0]}

    def compare(
        self,
        images: Tensor,
        seeds: range,
        reference: Tensor,
        device: torch.device,
        same_seeds: bool = True,
        sampling_rate: int | None = None,
    ) -> dict[str, Any]:
        """Metrics of images, videos, sounds or latents against full-precision ones, over all processes.

        Args:
            images: this process's share, from `sample_variant`.
            seeds: seeds of the images of all processes.
            reference: full-precision images, also this process's share.
            device: where the metrics are computed.
            same_seeds: whether `reference` holds the same seeds, so that images can be compared one by one.
            sampling_rate: of sounds.

        Returns:
            The numbers by key, and ``n_images``.
        """
        prompts = self.sampler.prompts_of([seed for batch in share(seeds, self.sampler) for seed in batch])
        metrics = self.metrics(device)
        with using_tf32(False):
            metrics.update(images, reference, same_seeds, prompts, sampling_rate)
            n_images = distributed.sum_over_ranks(torch.tensor(len(images), device=device))
            return {**metrics.compute(), "n_images": int(n_images)}
