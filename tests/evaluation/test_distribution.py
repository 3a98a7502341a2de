"""Distances between sets of images against torch-fidelity and brute force, on one and more processes."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.evaluation.metrics.frechet import FrechetDistance
from fpq_lightning.evaluation.metrics.kernel import KernelDistance
from fpq_lightning.evaluation.networks.cifar10 import CIFAR10Network
from fpq_lightning.evaluation.networks.network import FeatureNetwork
from fpq_lightning.evaluation.quality import QualityMetrics
from fpq_lightning.utils.resources import find_features

GOLDEN = Path(__file__).parent / "golden"


def _golden_features() -> tuple[Tensor, Tensor, Tensor]:
    spec = importlib.util.spec_from_file_location("torch_fidelity_values", GOLDEN / "torch_fidelity_values.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    images, reference, logits = (torch.from_numpy(x) for x in module.features())
    return images, reference, logits


class _Table(FeatureNetwork):
    """A network whose features of image i are row i of a table; images are their own numbers."""

    name = "table"

    def __init__(self, pooled: Tensor, logits: Tensor, spatial: Tensor | None = None) -> None:
        super().__init__()
        self.pooled, self.logits, self.spatial = pooled, logits, spatial
        self.num_features = pooled.shape[1]
        if spatial is not None:
            self.num_spatial_features = spatial.shape[1]

    def describe(self, images: Tensor) -> dict[str, Tensor]:
        rows = images.flatten().long()
        found = {"pooled": self.pooled[rows], "logits": self.logits[rows]}
        return found if self.spatial is None else {**found, "spatial": self.spatial[rows]}


def _compare(
    table: _Table, images: Tensor, reference: Tensor, network: str = "features", real: Any = None, chunk: int = 90
) -> dict[str, Any]:
    """Metrics on a table's features; images are numbers, which are not compared one by one."""
    metrics = QualityMetrics(EvaluationConfig(), {network: table}, None if real is None else {network: real})
    for a, b in zip(images.split(chunk), reference.split(chunk), strict=True):
        metrics.update(a, b, same_seeds=False)
    return {name: value for name, value in metrics.compute().items() if name not in ("psnr", "ssim")}


def _numbers(start: int, n: int) -> Tensor:
    return torch.arange(start, start + n).double().reshape(-1, 1, 1, 1)


# --- torch-fidelity --------------------------------------------------------------------------------------------


def test_all_metrics_are_those_of_torch_fidelity() -> None:
    golden = json.loads((GOLDEN / "torch_fidelity.json").read_text())["values"]
    images, reference, logits = _golden_features()
    n, m = len(images), len(reference)
    table = _Table(torch.cat([images, reference]), torch.cat([logits, torch.zeros(m, logits.shape[1])]))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    found = _compare(table, _numbers(0, n)[order], _numbers(n, m))
    assert found["fd"] == pytest.approx(golden["frechet_inception_distance"], rel=1e-5)
    assert found["kid"] == pytest.approx(golden["kernel_inception_distance_mean"], rel=1e-5)
    assert found["is"] == pytest.approx(golden["inception_score_mean"], rel=1e-6)
    assert found["precision"] == pytest.approx(golden["precision"], abs=1e-6)
    assert found["recall"] == pytest.approx(golden["recall"], abs=1e-6)
    assert golden["precision"] - golden["recall"] > 0.1  # so that one cannot pass for the other


# --- kernel distance -------------------------------------------------------------------------------------------


def _kernel_distance_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimator, a pair of points at a time."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def others(points: np.ndarray) -> float:
        pairs = [k(a, b) for i, a in enumerate(points) for j, b in enumerate(points) if i != j]
        return sum(pairs) / len(pairs)

    cross = [k(a, b) for a in x for b in y]
    return others(x) + others(y) - 2 * sum(cross) / len(cross)


@given(seed=st.integers(0, 2**16), n=st.integers(2, 9), m=st.integers(2, 9), chunk=st.integers(1, 5))
def test_the_kernel_distance_is_that_of_its_definition(seed: int, n: int, m: int, chunk: int) -> None:
    draw = np.random.default_rng(seed)
    x, y = draw.normal(size=(n, 3)), draw.normal(size=(m, 3)) + 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpq_lightning.evaluation.metrics.kernel._CHUNK", chunk)
        metric = KernelDistance()
        metric.update(torch.from_numpy(x), real=False)
        metric.update(torch.from_numpy(y), real=True)
        assert metric.compute().item() == pytest.approx(_kernel_distance_by_hand(x, y), rel=1e-9, abs=1e-12)


def test_a_kernel_distance_needs_two_images() -> None:
    metric = KernelDistance()
    metric.update(torch.randn(1, 2), real=False)
    metric.update(torch.randn(4, 2), real=True)
    with pytest.raises(ValueError, match="at least 2 images"):
        metric.compute()


# --- together --------------------------------------------------------------------------------------------------


def test_each_metric_compares_what_it_should() -> None:
    """Spatial features, and real images, are told apart from pooled features and the full-precision images."""
    draw = torch.Generator().manual_seed(3)
    pooled, logits = torch.randn(120, 4, generator=draw), torch.randn(120, 5, generator=draw)
    spatial = 3 * torch.randn(120, 6, generator=draw) + 1
    real = {"pooled": pooled[80:], "spatial": spatial[80:], "logits": logits[80:]}
    found = _compare(_Table(pooled, logits, spatial), _numbers(0, 40), _numbers(40, 40), "inception", real)

    def distance(x: Tensor, y: Tensor) -> float:
        metric = FrechetDistance(x.shape[1])
        metric.update(x, real=False)
        metric.update(y, real=True)
        return metric.compute().item()

    assert found["fid"] == pytest.approx(distance(pooled[:40], pooled[40:80]))
    assert found["fid_real"] == pytest.approx(distance(pooled[:40], pooled[80:]))
    assert found["sfid"] == pytest.approx(distance(spatial[:40], spatial[40:80]))
    assert found["sfid_real"] == pytest.approx(distance(spatial[:40], spatial[80:]))
    kernel = _kernel_distance_by_hand(pooled[:40].numpy(), pooled[80:].numpy())
    assert found["kid_inception_real"] == pytest.approx(kernel, rel=1e-5)
    others = {"precision_inception", "recall_inception", "precision_inception_real", "recall_inception_real"}
    assert others | {"kid_inception", "is_inception"} <= found.keys()
    assert len({round(v, 9) for v in found.values() if v is not None and v not in (0, 1)}) >= 7


def test_metrics_of_the_inception_network_have_their_published_names() -> None:
    table = _Table(torch.randn(30, 4), torch.randn(30, 5), torch.randn(30, 6))
    found = _compare(table, _numbers(0, 15), _numbers(15, 15), "inception")
    names = {"fid", "sfid", "kid_inception", "precision_inception", "recall_inception", "is_inception"}
    assert {name for name, value in found.items() if value is not None} == names


def test_too_few_images_leave_out_only_what_needs_more() -> None:
    table = _Table(torch.randn(6, 2), torch.randn(6, 3))
    found = _compare(table, _numbers(0, 3), _numbers(3, 3))
    assert found["precision"] is found["recall"] is None
    assert found["fd"] is not None
    assert found["kid"] is not None
    assert all(v is None or math.isfinite(v) for v in found.values())


def test_images_of_another_size_than_the_reference_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 8, 8\) cannot be compared .* \(3, 16, 16\)"):
        QualityMetrics(EvaluationConfig()).update(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 16, 16))


def test_statistics_of_another_network_are_refused(tmp_path: Path) -> None:
    network = CIFAR10Network.load(find_features("cifar10-features"))
    metric = FrechetDistance(network.num_features)
    metric.update(network(torch.rand(4, 3, 32, 32)), real=True)

    def metrics(file: str, network: FeatureNetwork) -> QualityMetrics:
        return QualityMetrics(EvaluationConfig(real=str(tmp_path / file)), {"features": network})

    metric.save_statistics(tmp_path / "a.safetensors", "another network")
    with pytest.raises(ValueError, match="of another network, not of cifar10-features"):
        metrics("a.safetensors", network)
    metric.save_statistics(tmp_path / "b.safetensors", "cifar10-features")
    with_real = metrics("b.safetensors", network)
    with_real.update(torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32))
    assert with_real.compute()["fd_real"] is not None
    narrow = _Table(torch.randn(3, 5), torch.randn(3, 2))
    narrow.name = "cifar10-features"
    with pytest.raises(ValueError, match="no statistics of 5 features"):
        metrics("b.safetensors", narrow)


def test_larger_images_reach_the_feature_network_averaged_over_areas() -> None:
    network = CIFAR10Network.load(find_features("cifar10-features"))
    small = torch.rand(3, 3, 32, 32) * 2 - 1
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    large = large + torch.tensor([[0.1, -0.1], [-0.1, 0.1]]).repeat(32, 32)  # whose mean over an area is zero
    assert torch.allclose(network(large), network(small), atol=1e-4)


# --- several processes -----------------------------------------------------------------------------------------


def _share(rank: int, world_size: int, directory: str) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{directory}/store-{world_size}", rank=rank, world_size=world_size
        )
    images, reference, logits = _golden_features()
    n, m = len(images), len(reference)
    table = _Table(torch.cat([images, reference]), torch.cat([logits, torch.zeros(m, logits.shape[1])]))
    real = {"pooled": reference[rank::world_size] + 0.2, "logits": logits[rank::world_size]}
    mine, others = _numbers(0, n)[rank::world_size], _numbers(n, m)[rank::world_size]
    found = _compare(table, mine, others, real=real, chunk=10_000)
    Path(directory, f"found-{world_size}-{rank}.json").write_text(json.dumps(found))
    if world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def test_one_two_and_four_processes_say_the_same(tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    for world_size in (1, 2, 4):
        torch.multiprocessing.spawn(_share, (world_size, str(tmp_path)), world_size)
        found += [json.loads((tmp_path / f"found-{world_size}-{i}.json").read_text()) for i in range(world_size)]
    assert len(found[0]) == 9
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)
