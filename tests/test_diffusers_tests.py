"""Tests of diffusers give tiny pipelines and how each is sampled."""

from __future__ import annotations

import pytest
from diffusers_tests import PipelineTest, pipeline_tests

SOURCE = """
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


class Base:
    pipeline_class = StableDiffusionImg2ImgPipeline

    def get_dummy_components(self, kind):
        blocks = ("DownEncoderBlock2D",), ("UpDecoderBlock2D",)
        return {
            "unet": UNet2DConditionModel(
                8, block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2,
                norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            ),
            "scheduler": DDIMScheduler(),
            "vae": AutoencoderKL(3, 3, *blocks, (8,), norm_num_groups=4),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(vocab_size=1000, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
            ),
            "tokenizer": CLIPTokenizer.from_pretrained("somewhere/on-the-hub"),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }


class TestMadeUp(Base):
    batch_params = frozenset(["prompt", "image"])

    def get_dummy_components(self):
        return super().get_dummy_components("tiny")

    def get_dummy_inputs(self, device, seed=0):
        return {
            "prompt": "A cat", "image": Image.new("RGB", (8, 8)), "generator": torch.manual_seed(seed),
            "num_inference_steps": 2, "strength": 1.0, "output_type": "pt",
        }
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> PipelineTest:
    checkout = tmp_path_factory.mktemp("diffusers")
    folder = checkout / "tests" / "pipelines" / "made_up"
    folder.mkdir(parents=True)
    for parent in (folder, *folder.parents[:2]):
        (parent / "__init__.py").touch()
    (folder / "test_made_up.py").write_text(SOURCE)
    (test,) = pipeline_tests(checkout).values()
    return test


def test_a_test_that_needs_no_choice_is_found_and_runs(found: PipelineTest) -> None:
    assert (found.pipeline, found.name) == ("StableDiffusionImg2ImgPipeline", "TestMadeUp")
    found.run()


def test_inputs_of_a_test_become_options_of_a_sampler(found: PipelineTest) -> None:
    components, options = found.make()
    rows = options.pop("inputs")
    assert options == {"steps": 2, "arguments": {"strength": 1.0}}
    assert [row["image"].size for row in rows] == [(8, 8)] * 3
    assert not components["unet"].training
