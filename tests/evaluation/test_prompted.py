"""Metrics of images and their prompts."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import LETTERS, save_letters
from scipy import stats
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from fpq_lightning.diffusion.sampling import SamplerConfig
from fpq_lightning.evaluation import evaluator as evaluator_module
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.evaluation.evaluator import Evaluator
from fpq_lightning.evaluation.metrics.class_accuracy import PromptedClassAccuracy
from fpq_lightning.evaluation.metrics.clip_score import PromptScore
from fpq_lightning.evaluation.networks.cifar10 import CIFAR10Network
from fpq_lightning.evaluation.networks.network import FeatureNetwork
from fpq_lightning.evaluation.quality import QualityMetrics
from fpq_lightning.utils.resources import FEATURES, find_features

CLASSES = ("cat", "dog", "hot dog")


def _logits(winners: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(winners), len(CLASSES)).float()


# --- class accuracy --------------------------------------------------------------------------------------------


def test_prompts_that_name_no_class_or_several_do_not_count() -> None:
    metric = PromptedClassAccuracy(CLASSES)
    prompts = ["a Cat!", "a cat and a dog", "a catfish", "the dog, asleep", "dog"]
    metric.update(_logits([0, 0, 0, 0, 1]), prompts)
    assert metric.compute()["class_accuracy"].item() == pytest.approx(2 / 3)  # cat right, dog wrong, dog right
    nothing = PromptedClassAccuracy(CLASSES)
    nothing.update(_logits([0]), ["a bird"])
    with pytest.raises(ValueError, match="no prompt names"):
        nothing.compute()


@given(right=st.integers(0, 300), wrong=st.integers(0, 300))
def test_the_interval_is_that_of_a_bootstrap_of_the_images(right: int, wrong: int) -> None:
    n = right + wrong
    if not n:
        return
    metric = PromptedClassAccuracy(CLASSES)
    metric.update(_logits([0] * right + [1] * wrong), ["a cat"] * n)
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found["class_accuracy"] == pytest.approx(right / n)
    # Quantiles of the resampled share, which is binomial; 10,000 resamples know them to a few steps of 1 / n.
    for name, q in (("class_accuracy_low", 0.025), ("class_accuracy_high", 0.975)):
        near = [stats.binom.ppf(q + d, n, right / n) / n for d in (-0.008, 0.008)]
        assert near[0] - 1e-9 <= found[name] <= near[1] + 1e-9


def test_the_shipped_network_knows_the_classes_of_real_images() -> None:
    """Its names stand in the order of its logits: real statistics cannot tell, so images of the data do."""
    parquet = Path(__file__).parents[3] / "shared" / "data" / "cifar10" / "test.parquet"
    if not parquet.is_file():
        pytest.skip("CIFAR-10 is not beside the checkout")
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(parquet), split="train[:200]")
    images = torch.from_numpy(np.stack([np.asarray(image) for image in rows["image"]])).permute(0, 3, 1, 2) / 127.5 - 1
    network = CIFAR10Network.load(find_features(FEATURES))
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")  # of CIFAR-10
    metric = PromptedClassAccuracy(network.classes)
    with torch.no_grad():
        metric.update(network.describe(images)["logits"], [f"a photo of a {names[label]}" for label in rows["label"]])
    assert metric.compute()["class_accuracy"] > 0.8


# --- CLIP score ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIP model on disk."""
    directory = tmp_path_factory.mktemp("clip") / "tiny"
    directory.mkdir()
    tokenizer = save_letters(directory)
    tower: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tower["num_attention_heads"] = 2
    n = len(LETTERS)
    tokens = {"bos_token_id": n - 2, "eos_token_id": n - 1}
    text = {**tower, **tokens, "vocab_size": n, "max_position_embeddings": 16}
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8}, projection_dim=8)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(directory)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(directory)
    return str(directory)


def _images(n: int) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(n)) * 2 - 1


def test_the_score_is_the_mean_cosine_of_image_and_prompt(clip: str) -> None:
    prompts = ["a cat", "two dogs", "b"]
    images = _images(3)
    metric = PromptScore(clip)
    metric.update(images[:1], prompts[:1])
    metric.update(images[1:], prompts[1:])
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    pixels = ((images + 1) * 127.5).round().byte()
    with torch.no_grad():
        given = processor(text=prompts, images=list(pixels), return_tensors="pt", padding=True)
        found = model(**given)  # its own normalised embeddings, by another path
    cosines = (found.image_embeds.double() * found.text_embeds.double()).sum(1)
    assert metric.compute().item() == pytest.approx(max(0, 100 * cosines.mean().item()), abs=1e-3)


def test_a_prompt_that_is_too_long_is_cut_before_its_end_token(clip: str) -> None:
    letters = " ".join("abcdefghijklmnopqrstuvwxyz")
    metric = PromptScore(clip)
    scores = []
    for prompt in (letters, " ".join(letters.split()[:14])):  # 16 positions, two of them for start and end
        metric.reset()
        metric.update(_images(1), [prompt])
        scores.append(metric.score.item())
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_a_model_that_is_not_there_is_said_and_one_of_the_hub_left_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"there is no CLIP model {tmp_path / 'none'}")):
        Evaluator(EvaluationConfig(clip=str(tmp_path / "none")), SamplerConfig()).check()
    with pytest.warns(UserWarning, match="the metric CLIP score is left out: .*owner/none"):
        QualityMetrics(EvaluationConfig(clip="owner/none"))


# --- together --------------------------------------------------------------------------------------------------


def test_prompts_reach_their_metrics_and_without_them_nothing_is_said(clip: str) -> None:
    config = EvaluationConfig(n_images=4, clip=clip)
    images, reference, device = _images(4), _images(5)[:4], torch.device("cpu")
    prompts = ["a photo of a cat", "a photo of a frog", "a ship", "nothing"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Evaluator(config, SamplerConfig(prompts=prompts)).compare(images, range(4), reference, device)
        without = Evaluator(config, SamplerConfig()).compare(images, range(4), reference, device)
    assert 0 <= found["class_accuracy_low"] <= found["class_accuracy"] <= found["class_accuracy_high"] <= 1
    assert found["clip_score"] >= 0
    assert not any(name.startswith(("class_accuracy", "clip_score")) for name in without)


class _Logits(FeatureNetwork):
    """Takes logits for images."""

    name = "logits"
    num_features = 3
    classes = CLASSES

    def describe(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = images.flatten(1)
        return {"pooled": logits, "logits": logits}


def _share(rank: int, world_size: int, directory: str) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{directory}/store-{world_size}", rank=rank, world_size=world_size
        )
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(21, 3, 1, 1, generator=draw)
    prompts = [f"a {CLASSES[i % 2]}" for i in range(21)]
    metrics = QualityMetrics(EvaluationConfig(), {"features": _Logits()})
    metrics.update(logits[rank::world_size], logits[rank::world_size], False, prompts[rank::world_size])
    Path(directory, f"found-{world_size}-{rank}.json").write_text(json.dumps(metrics.compute()))
    if world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def test_one_and_two_processes_say_the_same(tmp_path: Path) -> None:
    found = []
    for world_size in (1, 2):
        torch.multiprocessing.spawn(_share, (world_size, str(tmp_path)), world_size)
        found += [json.loads((tmp_path / f"found-{world_size}-{i}.json").read_text()) for i in range(world_size)]
    names = [name for name in found[0] if name.startswith("class_accuracy")]
    assert len(names) == 3
    for other in found[1:]:
        assert {name: other[name] for name in names} == pytest.approx({name: found[0][name] for name in names})


def test_every_image_of_every_batch_is_judged_by_the_prompt_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator_module, "_BATCH", 4)
    prompts = [f"a {CLASSES[i]}" for i in (0, 1, 1, 0, 1, 0, 0)]
    seeds = range(5, 16)
    evaluator = Evaluator(EvaluationConfig(n_images=11), SamplerConfig(prompts=prompts, batch_size=3))
    evaluator.networks = {"features": _Logits()}  # type: ignore[misc]
    winners = [CLASSES.index(prompts[seed % 7][2:]) for seed in seeds]
    for wrong in (0, 3):  # of the first ones
        chosen = [1 - w if i < wrong else w for i, w in enumerate(winners)]
        images = _logits(chosen)[:, :, None, None]
        found = evaluator.compare(images, seeds, images, torch.device("cpu"), same_seeds=False)
        assert found["class_accuracy"] == pytest.approx(1 - wrong / 11)
