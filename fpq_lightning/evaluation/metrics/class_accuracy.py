"""Class accuracy: whether a classifier finds the class that the prompt names."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric

_RESAMPLES = 10_000


class PromptedClassAccuracy(Metric):
    """Share of images that a classifier puts into the class their prompt names, with a bootstrap 95 % interval.

    Images whose prompt names no class or several classes do not count.

    Args:
        classes: names of the classes, in the order of the classifier's outputs.

    Example:
        >>> import torch
        >>> metric = PromptedClassAccuracy(["cat", "dog"])
        >>> metric.update(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), ["a cat", "a dog"])
        >>> metric.compute()["class_accuracy"].item()
        0.5
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: list[Tensor]

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self._names = [re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE) for name in classes]
        self.add_state("right", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, prompts: Sequence[str]) -> None:
        """Adds images.

        Args:
            logits: outputs of the classifier, `[n, classes]`.
            prompts: prompts of the images.
        """
        named = [[i for i, name in enumerate(self._names) if name.search(prompt)] for prompt in prompts]
        rows = [row for row, found in enumerate(named) if len(found) == 1]
        expected = torch.tensor([named[row][0] for row in rows], dtype=torch.long, device=logits.device)
        self.right.append((logits[rows].argmax(1) == expected).double())

    def compute(self) -> dict[str, Tensor]:
        """``class_accuracy`` and its interval, ``class_accuracy_low`` and ``class_accuracy_high``.

        The bootstrap resamples images, so the number of right ones in a resample is binomial.

        Raises:
            ValueError: if no prompt names exactly one class.
        """
        right = dim_zero_cat(self.right)
        if not len(right):
            raise ValueError("no prompt names one of the classes")
        generator = torch.Generator("cpu").manual_seed(0)
        share = right.mean().cpu()
        counts = torch.full((_RESAMPLES,), float(len(right)), dtype=torch.float64)
        resampled = torch.binomial(counts, share.expand(_RESAMPLES), generator=generator) / len(right)
        low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64))
        return {"class_accuracy": share, "class_accuracy_low": low, "class_accuracy_high": high}


METRICS.register(
    ImageMetric(
        name="class_accuracy",
        help="Share of images in the class that their prompt names, by the configured feature network.",
        columns=(
            Column("class_accuracy", "class accuracy", 4),
            Column("class_accuracy_low", "2.5 %", 4),
            Column("class_accuracy_high", "97.5 %", 4),
        ),
        inputs=("logits", "prompts"),
        make=lambda network: PromptedClassAccuracy(network.classes) if network.classes else None,
        network="features",
    )
)
