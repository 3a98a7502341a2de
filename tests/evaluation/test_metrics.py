"""Metrics against float64 and scipy, and evaluation that does not hang on the batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from models import CHECKOUT, tiny_pipeline
from safetensors.torch import save_file
from torch import Tensor

from fpq_lightning.diffusion.sampling import SamplerConfig, batches_of, sample, set_sampler
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.evaluation.evaluator import Evaluator
from fpq_lightning.evaluation.metrics.frechet import FrechetDistance
from fpq_lightning.evaluation.networks.cifar10 import CIFAR10Network
from fpq_lightning.evaluation.networks.network import FeatureNetwork
from fpq_lightning.evaluation.quality import QualityMetrics
from fpq_lightning.evaluation.sampling import sample_variant

FEATURES = CHECKOUT / "data" / "cifar10-features"


class _Projection(FeatureNetwork):
    """Features whose covariance has full rank with few images."""

    name = "projection"
    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(3 * 16 * 16, 12, generator=torch.Generator().manual_seed(0)) / 16
        self.register_buffer("weight", weight)

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1) @ self.weight).tanh() + 0.5

    def describe(self, images: Tensor) -> dict[str, Tensor]:
        return {"pooled": self(images)}


def _quality(network: FeatureNetwork | None = None, **options: Any) -> QualityMetrics:
    return QualityMetrics(EvaluationConfig(**options), {} if network is None else {"features": network})


def _images(seed: int, n: int = 60, shift: float = 0.0, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 3, size, size, generator=generator) * (0.3 + shift) + shift).clamp(-1, 1)


def _frechet(a: Tensor, b: Tensor) -> float:
    """The textbook formula in float64, with the matrix square root of scipy."""
    x, y = a.double().numpy(), b.double().numpy()
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * np.real(root)))


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.3])
def test_the_frechet_distance_is_that_of_scipy_in_float64(shift: float) -> None:
    features = _Projection()
    a, b = _images(1), _images(2, n=80, shift=shift)
    metric = FrechetDistance(features.num_features)
    for chunk in a.split(25):
        metric.update(features(chunk), real=True)
    for chunk in b.split(17):
        metric.update(features(chunk), real=False)
    assert metric.compute().item() == pytest.approx(_frechet(features(a), features(b)), rel=1e-4)


def test_the_frechet_distance_on_the_embedded_features_is_that_of_scipy() -> None:
    features = CIFAR10Network.load(FEATURES)
    a, b = _images(1, 40, size=32), _images(2, 40, 0.1, size=32)
    metrics = _quality(features)
    metrics.update(a, b)
    # With fewer images than features the covariances are singular, where sqrtm loses some digits.
    assert metrics.compute()["fd"] == pytest.approx(_frechet(features(a), features(b)), rel=5e-3)


def test_statistics_survive_the_disk_with_the_same_distance(tmp_path: Path) -> None:
    a, b, features = _images(1), _images(2, shift=0.1), _Projection()
    whole = FrechetDistance(features.num_features)
    whole.update(features(a), real=True)
    whole.save_statistics(tmp_path / "real.safetensors")
    loaded = FrechetDistance(features.num_features)
    loaded.load_statistics(tmp_path / "real.safetensors")
    for metric in (whole, loaded):
        metric.update(features(b), real=False)
    assert loaded.compute().item() == whole.compute().item() > 0.01
    metrics = _quality(features, real=str(tmp_path / "real.safetensors"))
    metrics.update(b, b)
    assert metrics.compute()["fd_real"] == pytest.approx(whole.compute().item(), rel=1e-6)


def test_missing_statistics_are_a_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"evaluation\.real"):
        _quality(_Projection(), real=str(tmp_path / "none.safetensors"))


def test_psnr_is_the_mean_over_images_of_10_log10_4_over_mse() -> None:
    a, b = _images(1, 10), _images(1, 10)
    for i in range(10):
        b[i] = (b[i] + 0.01 * (i + 1)).clamp(-1, 1)
    expected = []
    for x, y in zip(a.double(), b.double(), strict=True):
        expected.append(10 * math.log10(4 / ((x - y) ** 2).mean().item()))
    assert max(expected) - min(expected) > 15  # so that the mean over images is no mean over pixels
    metrics = _quality()
    for x, y in zip(a.split(3), b.split(3), strict=True):
        metrics.update(x, y)
    assert metrics.compute()["psnr"] == pytest.approx(sum(expected) / 10, abs=1e-3)


def test_ssim_is_one_for_equal_images_and_less_for_others() -> None:
    a = _images(1, 6)
    equal, other = _quality(), _quality()
    equal.update(a, a)
    other.update(a, (a + 0.2 * torch.randn(a.shape, generator=torch.Generator().manual_seed(5))).clamp(-1, 1))
    assert equal.compute()["ssim"] == pytest.approx(1.0, abs=1e-5)
    assert other.compute()["ssim"] < 0.95
    assert equal.compute()["psnr"] is None  # infinite
    assert equal.compute()["fd"] is None  # without features


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("batch", [0, 1])
def test_non_finite_images_give_none_and_no_exception(value: float, batch: int) -> None:
    metrics = _quality(_Projection())
    for i in range(2):
        images = _images(i, 6)
        if i == batch:
            images[2, 0, 0, 0] = value
            images[4, 1, 2, 3] = value
        metrics.update(images, _images(i + 5, 6))
    assert metrics.compute() == {"fd": None, "fd_real": None, "psnr": None, "ssim": None, "not_finite": 2}


def test_images_of_other_seeds_are_not_compared_one_by_one() -> None:
    evaluator = Evaluator(EvaluationConfig(n_images=60), SamplerConfig())
    evaluator.networks = {"features": _Projection()}
    found = evaluator.compare(_images(1), range(60), _images(2), torch.device("cpu"), same_seeds=False)
    assert found["psnr"] is None
    assert found["ssim"] is None
    assert found["fd"] == pytest.approx(_frechet(_Projection()(_images(1)), _Projection()(_images(2))), rel=1e-3)
    assert found["n_images"] == 60


def test_the_embedded_feature_network_loads_and_tells_images_apart() -> None:
    features = CIFAR10Network.load(FEATURES)
    assert not features.training
    images = _images(1, 5, size=32)
    found = features(images)
    assert found.shape == (5, 256)
    assert torch.allclose(features(images[2:3]), found[2:3], atol=1e-4)
    assert found.std(0).mean() > 1e-3
    assert features.num_features == 256


def test_a_missing_feature_network_is_a_file_not_found_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"evaluation\.features must name its directory, or be null"):
        CIFAR10Network.load(tmp_path)


def test_a_feature_network_of_another_shape_is_one_clear_line(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        CIFAR10Network.load(tmp_path)
    assert "\n" not in str(error.value)


def test_image_i_is_the_same_whatever_the_batch_size() -> None:
    pipeline = tiny_pipeline()
    found = {
        size: sample_variant(pipeline, SamplerConfig(steps=4, batch_size=size), range(5, 12), "full_precision")
        for size in (1, 3, 7)
    }
    assert found[7].shape == (7, 3, 8, 8)
    assert torch.allclose(found[1], found[7], atol=1e-4)
    assert torch.allclose(found[3], found[7], atol=1e-4)
    assert all((found[7][i] - found[7][j]).abs().max() > 0.1 for i in range(7) for j in range(i))


def test_image_i_starts_from_a_cpu_generator_with_its_seed() -> None:
    pipeline = tiny_pipeline()
    sampler = SamplerConfig(steps=3, batch_size=2)
    set_sampler(pipeline, sampler)
    started: list[Tensor] = []
    handle = pipeline.unet.register_forward_pre_hook(lambda module, args: started.append(args[0].clone()))
    images = sample(pipeline, sampler, [11, 4])
    handle.remove()
    expected = [torch.randn(1, 3, 8, 8, generator=torch.Generator("cpu").manual_seed(s))[0] for s in (11, 4)]
    assert torch.equal(started[0], torch.stack(expected))
    assert len(started) == 3
    assert images.min() >= -1
    assert images.max() <= 1


def test_a_variant_leaves_the_mode_of_the_layers_as_it_was() -> None:
    pipeline = tiny_pipeline()
    done: list[int] = []
    sample_variant(pipeline, SamplerConfig(steps=2, batch_size=2), range(5), "nearest", done.append)
    assert done == [2, 2, 1]


def test_batches_cover_the_seeds_in_order() -> None:
    assert [list(b) for b in batches_of(range(3, 10), 3)] == [[3, 4, 5], [6, 7, 8], [9]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_images": 1}, "at least 2"),
        ({"n_images": -2}, "n_images"),
        ({"real": "images", "features": None}, "needs evaluation.features"),
    ],
)
def test_unusable_evaluation_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**options)


@pytest.mark.parametrize("n_images", [0, 4])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"features": "/none"}, FileNotFoundError, "feature network"),
        ({"real": "/none.safetensors"}, ValueError, "statistics"),
        ({"inception": "/none.pth"}, ValueError, "Inception weights"),
    ],
)
def test_files_that_are_missing_are_found_by_the_check_and_not_before(
    options: dict, error: type[Exception], message: str, n_images: int
) -> None:
    evaluator = Evaluator(EvaluationConfig(n_images=n_images, **options), SamplerConfig())
    with pytest.raises(error, match=message):
        evaluator.check()


def test_prompts_that_are_missing_are_found_by_the_check_and_not_before() -> None:
    evaluator = Evaluator(EvaluationConfig(n_images=0), SamplerConfig(prompts="/none.txt"))
    with pytest.raises(FileNotFoundError, match=r"no file of prompts /none\.txt"):
        evaluator.check()
