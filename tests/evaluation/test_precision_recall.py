"""Improved precision and recall against brute force, and the right way round."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fpq_lightning.evaluation.metrics.precision_recall import PrecisionRecall


def _by_hand(images: Tensor, reference: Tensor, k: int) -> tuple[float, float]:
    """The definition, a pair of points at a time."""

    def distance(a: list[float], b: list[float]) -> float:
        return math.dist(a, b)

    def share(points: list[list[float]], manifold: list[list[float]]) -> float:
        radii = [
            sorted(distance(m, o) for j, o in enumerate(manifold) if j != i)[k - 1] for i, m in enumerate(manifold)
        ]
        return sum(any(distance(p, m) <= r for m, r in zip(manifold, radii, strict=True)) for p in points) / len(points)

    a, b = images.double().tolist(), reference.double().tolist()
    return share(a, b), share(b, a)


def _measure(images: Tensor, reference: Tensor, k: int = 3, batch: int = 7) -> tuple[float, float]:
    metric = PrecisionRecall(k)
    for chunk in images.split(batch):
        metric.update(chunk, real=False)
    for chunk in reference.split(batch):
        metric.update(chunk, real=True)
    values = metric.compute()
    return values["precision"].item(), values["recall"].item()


@given(seed=st.integers(0, 2**16), n=st.integers(5, 30), m=st.integers(5, 30), k=st.integers(1, 4))
def test_both_are_those_of_the_definition(seed: int, n: int, m: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, reference = torch.randn(n, 3, generator=generator), 1.5 * torch.randn(m, 3, generator=generator)
    assert _measure(images, reference, k) == pytest.approx(_by_hand(images, reference, k))


def test_images_of_one_mode_of_two_are_precise_and_recall_half() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(200, 2), torch.randn(200, 2) + 100
    precision, recall = _measure(torch.randn(200, 2), torch.cat([left, right]))
    assert precision > 0.9
    assert 0.4 < recall < 0.52
    precision, recall = _measure(torch.cat([left, right]), torch.randn(200, 2))
    assert 0.4 < precision < 0.52
    assert recall > 0.9


def test_a_set_against_itself_is_whole_and_against_one_far_away_nothing() -> None:
    torch.manual_seed(1)
    x = torch.randn(50, 4)
    assert _measure(x, x) == (1.0, 1.0)
    assert _measure(x, x + 1000) == (0.0, 0.0)


def test_more_points_than_a_chunk_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    images, reference = torch.randn(60, 3), torch.randn(70, 3)
    whole = _measure(images, reference)
    monkeypatch.setattr("fpq_lightning.evaluation.metrics.precision_recall._CHUNK", 13)
    assert _measure(images, reference) == whole


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 images"):
        _measure(torch.randn(3, 2), torch.randn(9, 2))
