"""What image quality is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fpq_lightning.utils.files import paths_to_text
from fpq_lightning.utils.resources import FEATURES
from fpq_lightning.utils.values import Count, CountOrZero, check_values


@dataclass
class EvaluationConfig:
    """What image quality is measured on.

    Making one reads no file; `Evaluator.check` does.

    Attributes:
        n_images: number of images of each variant; 0 turns evaluation off.
        seed: seed of the first image; image i has seed + i.
        features: directory of a feature network for distances between distributions; the default is the shipped one,
            null leaves these distances out.
        inception: also use the network of FID: ``auto`` for the usual cache, or a file of its weights. Needs the extra
            ``fid``.
        lpips: also measure LPIPS, on this network. Needs the extra ``fid``.
        clip: also measure the CLIP score, on this model: a directory or a hub id such as
            ``openai/clip-vit-base-patch16``. For text-to-image pipelines.
        real: real images to compare with: a statistics file, a parquet file, or the name or directory of a `datasets`
            dataset.
        real_column: column of the images in that dataset.
        n_real: use only the first images of that dataset; null uses all.
        corrupt: what to do with a real image that cannot be read.
        reference: for `fpq test`, the full-precision model to compare with; null takes the one that was quantized.
        images: directory that keeps sampled images, so that they are sampled only once; null leaves the choice to the
            command.
    """

    n_images: CountOrZero = 64
    seed: int = 0
    features: str | None = FEATURES
    inception: str | None = None
    lpips: Literal["alex", "vgg", "squeeze"] | None = None
    clip: str | None = None
    real: str | None = None
    real_column: str = "image"
    n_real: Count | None = None
    corrupt: Literal["fail", "skip"] = "fail"
    reference: str | None = None
    images: str | None = None

    def __post_init__(self) -> None:
        paths_to_text(self)
        check_values(self, "evaluation")
        if self.n_images == 1:
            raise ValueError(f"evaluation.n_images must be 0 or at least 2, got {self.n_images}")
        if self.real is not None and self.features is None and self.inception is None:
            raise ValueError("evaluation.real needs evaluation.features or evaluation.inception")
        if self.real_statistics is not None and self.features is None:
            raise ValueError("evaluation.real needs evaluation.features, the network whose statistics it holds")

    @property
    def real_statistics(self) -> str | None:
        """The statistics file of real images, if `real` is one."""
        return self.real if self.real is not None and self.real.endswith(".safetensors") else None

    @property
    def real_images(self) -> str | None:
        """The dataset of real images, if `real` is one."""
        return None if self.real_statistics else self.real

    @property
    def seeds(self) -> range:
        """Seeds of the images."""
        return range(self.seed, self.seed + self.n_images)
