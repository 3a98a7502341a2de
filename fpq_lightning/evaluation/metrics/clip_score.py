"""CLIP score: how well images fit their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from torch import Tensor
from torchmetrics.multimodal import CLIPScore
from transformers import CLIPModel, CLIPProcessor

from fpq_lightning.diffusion.media import to_bytes
from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric


class _Clip(CLIPModel):
    """A CLIP model whose features are tensors, as torchmetrics expects, in every version of transformers."""

    def get_image_features(self, *args: Any, **kwargs: Any) -> Tensor:
        return _tensor(super().get_image_features(*args, **kwargs))

    def get_text_features(self, *args: Any, **kwargs: Any) -> Tensor:
        return _tensor(super().get_text_features(*args, **kwargs))


def _tensor(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else features.pooler_output


class PromptScore(CLIPScore):
    """100 times the mean cosine of the CLIP features of images and prompts (arXiv 2104.08718), at least 0.

    The tokenizer cuts long prompts to the model's length and keeps the end token that CLIP reads.

    Args:
        model: directory or hub id of a CLIP model.

    Raises:
        OSError: if there is no such model.

    Example:
        >>> metric = PromptScore("openai/clip-vit-base-patch16")  # doctest: +SKIP
        >>> metric.update(images, ["a cat", "a dog"])  # doctest: +SKIP
        >>> score = metric.compute()  # doctest: +SKIP
    """

    def __init__(self, model: str) -> None:
        def load() -> tuple[CLIPModel, Any]:
            processor: Any = CLIPProcessor.from_pretrained(model)
            clip = _Clip.from_pretrained(model).eval().requires_grad_(False)
            length = clip.config.text_config.max_position_embeddings
            return clip, partial(processor, truncation=True, max_length=length)

        super().__init__(load)

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:  # type: ignore[override]
        """Adds images `[n, 3, height, width]` in [-1, 1] and their prompts."""
        super().update(to_bytes(images), list(prompts))


def _cached_models() -> dict[str, Path | None]:
    found = sorted(path for path in Path(HF_HUB_CACHE).glob("models--*") if "clip" in path.name.lower())
    return {f"CLIP {path.name.split('--', 1)[1]}": path for path in found} or {"CLIP": None}


METRICS.register(
    ImageMetric(
        name="clip_score",
        help="How well images fit their prompts, by a CLIP model (evaluation.clip).",
        columns=(Column("clip_score", "CLIP score", 2),),
        inputs=("images", "prompts"),
        make=lambda config: None if config.clip is None else PromptScore(config.clip),
        weights=_cached_models,
    )
)
