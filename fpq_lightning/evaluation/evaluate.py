"""Evaluation by images: each variant of a model samples the same seeds, and metrics compare them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from fpq_lightning.diffusion.images import ImageDirectory, from_bytes, load_images, read_images, to_bytes
from fpq_lightning.diffusion.sampling import SamplerConfig, batches_of, running_pipeline, sample, using_sampler
from fpq_lightning.evaluation.metrics.clip import PromptScore
from fpq_lightning.evaluation.metrics.distribution import DistributionMetrics, Features
from fpq_lightning.evaluation.metrics.features import FeatureNetwork
from fpq_lightning.evaluation.metrics.inception import InceptionNetwork
from fpq_lightning.evaluation.metrics.quality import QualityMetrics
from fpq_lightning.nn.calibrated import Mode
from fpq_lightning.utils import distributed
from fpq_lightning.utils.resources import FEATURES, find_features

_BATCH = 250
SHOWN = 32  # images of each variant in a report


@dataclass
class EvaluationConfig:
    """What quality is measured on.

    Attributes:
        n_images: images of each variant; 0 leaves evaluation out.
        seed: of the first image; image i has seed + i.
        features: directory of a feature network, or null to leave distances between distributions out; the default
            is the shipped one.
        inception: the network of FID, too: ``auto`` for the usual cache, or a file of its weights. Needs the extra
            ``fid``.
        lpips: LPIPS on this network, too. Needs the extra ``fid``.
        clip: CLIP score on this model, too: a directory or a hub id such as ``openai/clip-vit-base-patch16``. For
            pipelines that take prompts.
        real: a statistics file of real images, or real images: the name or directory of a `datasets` dataset, or a
            parquet file.
        real_column: of the images of that dataset.
        n_real: how many of them, the first ones; null takes all.
        corrupt: what to do with one that cannot be read.
        reference: for `fpq test`, the full-precision model to compare with; null takes the one that was quantized.
        images: directory where sampled images are kept, so that they are not sampled again; null leaves it to the
            command.
    """

    n_images: int = 64
    seed: int = 0
    features: str | None = FEATURES
    inception: str | None = None
    lpips: Literal["alex", "vgg", "squeeze"] | None = None
    clip: str | None = None
    real: str | None = None
    real_column: str = "image"
    n_real: int | None = None
    corrupt: Literal["fail", "skip"] = "fail"
    reference: str | None = None
    images: str | None = None

    def __post_init__(self) -> None:
        if self.n_images < 0 or self.n_images == 1:
            raise ValueError(f"evaluation.n_images must be 0 or at least 2, got {self.n_images}")
        if self.features is not None:
            FeatureNetwork.load(find_features(self.features))
        if self.inception not in (None, "auto") and not Path(str(self.inception)).is_file():
            raise ValueError(f"there are no Inception weights {self.inception}: correct evaluation.inception")
        if self.clip is not None and self.clip.count("/") != 1 and not Path(self.clip).is_dir():
            raise ValueError(f"there is no CLIP model {self.clip}: correct evaluation.clip")
        if self.real is None:
            return
        if self.features is None and self.inception is None:
            raise ValueError("evaluation.real needs evaluation.features or evaluation.inception")
        if self._has_real_statistics:
            if self.features is None:
                raise ValueError("evaluation.real needs evaluation.features, the network whose statistics it holds")
            if not Path(self.real).is_file():
                raise ValueError(f"there is no statistics file {self.real}: correct evaluation.real or set it to null")

    @property
    def _has_real_statistics(self) -> bool:
        return self.real is not None and self.real.endswith(".safetensors")

    @property
    def seeds(self) -> range:
        """Seeds of the images."""
        return range(self.seed, self.seed + self.n_images)

    # --- metrics -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Opens all that images will be compared with, before hours are spent, and says what will be left out."""
        if not self.n_images:
            return
        for network in self._networks:
            width = int(network.num_features)  # type: ignore[arg-type]
            if self.n_images <= width and distributed.rank() == 0:
                warnings.warn(
                    f"{self.n_images} images are too few for the covariance of the {width} features of "
                    f"{network.name} (at least {width + 1}): such Fréchet distances only rank sets of this size",
                    stacklevel=2,
                )
        if self.real is not None and not self._has_real_statistics:
            load_images(self.real, self.real_column)

    @cached_property
    def _networks(self) -> list[nn.Module]:
        networks: list[nn.Module] = []
        if self.features is not None:
            networks.append(FeatureNetwork.load(find_features(self.features)))
        if self.inception is not None:
            try:
                networks.append(InceptionNetwork(None if self.inception == "auto" else self.inception))
            except (ModuleNotFoundError, FileNotFoundError) as error:
                _left_out("metrics on Inception features are", error)
        return networks

    @cached_property
    def _real_features(self) -> dict[str, Features]:
        return {}  # by name of the network, of this process's part

    def metrics(self, device: torch.device | str = "cpu") -> QualityMetrics:
        """Fresh metrics on a device.

        Raises:
            ValueError: if a real image cannot be read and `corrupt` is ``fail``.
        """
        distributions = []
        for network in self._networks:
            network.to(device)
            statistics = self.real if self._has_real_statistics and network is self._networks[0] else None
            if self.real is not None and not self._has_real_statistics and network.name not in self._real_features:
                self._real_features[str(network.name)] = self._describe_real(network, torch.device(device))
            real = self._real_features.get(str(network.name))
            distributions.append(DistributionMetrics(network, statistics, real))
        paired: dict[str, Metric] = {}
        if self.lpips is not None:
            try:
                paired["lpips"] = LearnedPerceptualImagePatchSimilarity(self.lpips)
            except (ModuleNotFoundError, OSError) as error:
                _left_out("LPIPS is", error)
        prompted: dict[str, Metric] = {}
        if self.clip is not None:
            try:
                prompted["clip_score"] = PromptScore(self.clip)
            except OSError as error:
                _left_out("the CLIP score is", error)
        return QualityMetrics(distributions, paired, prompted).to(device)

    def _describe_real(self, network: nn.Module, device: torch.device) -> Features:
        dataset = load_images(str(self.real), self.real_column)
        count = len(dataset) if self.n_real is None else min(self.n_real, len(dataset))
        rows = range(distributed.rank(), count, distributed.world_size())
        describe = DistributionMetrics(network).describe
        with using_tf32(False):
            found = [
                {name: value.cpu() for name, value in describe(batch.to(device)).items()}
                for batch in read_images(dataset, self.real_column, rows, _BATCH, self.corrupt)
            ]
        counts = distributed.all_gather_objects(sum(len(batch["pooled"]) for batch in found))
        if sum(counts) < 2 or not min(counts):
            raise ValueError(f"{self.real} has {sum(counts)} images that can be read: too few")
        return {name: torch.cat([batch[name] for batch in found]).to(device) for name in found[0]}


def _left_out(what: str, error: Exception) -> None:
    if distributed.rank() == 0:
        warnings.warn(f"{what} left out: {' '.join(str(error).split())[:200]}", stacklevel=2)


# --- images ----------------------------------------------------------------------------------------------------


@contextmanager
def using_tf32(allowed: bool) -> Iterator[None]:
    """Products in TF32 or float32; images are judged without, for its error is like that of FP8 activations."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def image_settings(weights: str, sampler: SamplerConfig, quantization: str | None = None) -> dict[str, Any]:
    """What decides images: a hash of the weights, the sampler, and what names the quantization."""
    return {"weights": weights, "quantization": quantization, "sampler": sampler.identity()}


def sample_images(
    pipeline: DiffusionPipeline,
    sampler: SamplerConfig,
    seeds: Sequence[int],
    directory: ImageDirectory | None = None,
) -> Tensor:
    """Images of seeds in eight bits, `[n, 3, height, width]` in [-1, 1], on the CPU.

    Image i is the same whatever the batch it is sampled in, up to the last bits of float32 products, which the
    rounding of activations makes a few levels of some pixels.

    Args:
        pipeline: in the mode wanted, with the sampler's scheduler.
        sampler: how images are sampled.
        seeds: of the images.
        directory: where images are kept.
    """

    def make(missing: Sequence[int]) -> Tensor:
        with using_tf32(False):
            images = sample(pipeline, sampler, missing)
        return torch.where(images.isfinite(), from_bytes(to_bytes(images.nan_to_num())), images)

    return make(seeds) if directory is None else directory.complete(seeds, make)


def share(seeds: range, sampler: SamplerConfig) -> list[range]:
    """This process's batches of seeds. Batches go round the processes."""
    world_size = distributed.world_size()
    return list(batches_of(seeds, sampler.batch_size, world_size))[distributed.rank() :: world_size]


def prompts_of_share(seeds: range, sampler: SamplerConfig) -> list[str] | None:
    """Prompts of this process's images, None without any."""
    return sampler.prompts_of([seed for batch in share(seeds, sampler) for seed in batch])


def sample_variant(
    pipeline: DiffusionPipeline,
    sampler: SamplerConfig,
    seeds: range,
    mode: Mode,
    on_batch: Callable[[int], object] = lambda n: None,
    directory: ImageDirectory | None = None,
) -> Tensor:
    """This process's part of the images of one variant, `[n, 3, height, width]` in [-1, 1], on the CPU.

    The first images are the first process's.
    """
    images = []
    with using_sampler(pipeline, sampler), running_pipeline(pipeline, mode):
        for batch in share(seeds, sampler):
            images.append(sample_images(pipeline, sampler, batch, directory))
            on_batch(len(batch))
    return torch.cat(images)


def compare(
    metrics: QualityMetrics,
    images: Tensor,
    reference: Tensor,
    device: torch.device,
    same_seeds: bool = True,
    prompts: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Metrics of a set of images, and their prompts, against full-precision ones, each process giving its part."""
    metrics.to(device)
    with using_tf32(False):
        for start in range(0, len(images), _BATCH):
            a, b = (x[start : start + _BATCH].to(device) for x in (images, reference))
            metrics.update(a, b, same_seeds, None if prompts is None else prompts[start : start + _BATCH])
        n_images = distributed.sum_over_ranks(torch.tensor(len(images), device=device))
        return {**metrics.compute(same_seeds), "n_images": int(n_images)}
