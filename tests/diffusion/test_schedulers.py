"""Which schedulers a pipeline can be sampled with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    UniPCMultistepScheduler,
)
from models import tiny_pipeline
from PIL import Image

import fpq_lightning as fpq
from fpq_lightning import SamplerConfig
from fpq_lightning.calibration.trajectories import sample_trajectories
from fpq_lightning.diffusion.sampling import FunctionSampler, generate, sample, set_sampler, shortened
from fpq_lightning.nn.calibrated import quantized_layers


def test_a_scheduler_of_the_same_kind_takes_the_place_of_the_pipelines_own() -> None:
    pipeline = tiny_pipeline()
    set_sampler(pipeline, SamplerConfig(scheduler="DPMSolverMultistepScheduler"))
    assert type(pipeline.scheduler) is DPMSolverMultistepScheduler


def test_a_scheduler_of_another_kind_is_refused_rather_than_making_wrong_images() -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = own = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"sampler\.scheduler DDIMScheduler does not fit .*: leave it out"):
        set_sampler(pipeline, SamplerConfig(scheduler="DDIMScheduler"))
    set_sampler(pipeline, SamplerConfig())
    assert pipeline.scheduler is own


def test_a_class_that_cannot_do_flow_matching_is_refused_for_a_configuration_that_does() -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="does not fit the pipeline's UniPCMultistepScheduler"):
        set_sampler(pipeline, SamplerConfig("DDIMScheduler"))
    set_sampler(pipeline, SamplerConfig("DPMSolverMultistepScheduler"))
    assert type(pipeline.scheduler) is DPMSolverMultistepScheduler
    assert pipeline.scheduler.config.use_flow_sigmas


def test_what_a_model_was_sampled_with_is_taken_where_nothing_else_is_given(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\na cat\n")
    kept = SamplerConfig("DDIMScheduler", steps=7, guidance_scale=2.5, prompts=str(file), batch_size=3).kept()
    file.unlink()  # prompts are kept, not their place
    found = SamplerConfig(steps=9, batch_size=5).or_else(kept)
    assert found == SamplerConfig("DDIMScheduler", 9, 2.5, ["a cat", "a dog"], batch_size=5)
    assert SamplerConfig().or_else({}) == SamplerConfig()


def test_guidance_of_zero_is_a_choice_and_not_the_want_of_one() -> None:
    assert SamplerConfig(guidance_scale=0.0).kept() == {"guidance_scale": 0.0}
    assert SamplerConfig().or_else({"guidance_scale": 0.0}).guidance_scale == 0
    assert SamplerConfig(guidance_scale=0.0).or_else({"guidance_scale": 5.0}).guidance_scale == 0


# --- what a pipeline is called with --------------------------------------------------------------------------------


class Labelled(DDPMPipeline):
    """Takes a label and a strength for each image, as class-conditional pipelines and img2img do."""

    def __call__(self, class_labels, generator, num_inference_steps=3, strength=1.0):  # type: ignore[no-untyped-def]
        images = np.stack([np.full((8, 8, 3), label / 10 * strength) for label in class_labels])
        return ImagePipelineOutput(images=images)


def labelled() -> Labelled:
    pipeline = tiny_pipeline()
    return Labelled(pipeline.unet, pipeline.scheduler)


def test_columns_of_a_dataset_and_constants_become_arguments(tmp_path: Path) -> None:
    file = tmp_path / "inputs.jsonl"
    file.write_text("\n".join(json.dumps({"class_labels": label}) for label in (1, 2, 4)))
    found = sample(labelled(), SamplerConfig(inputs=str(file), arguments={"strength": 0.5}), [1, 2, 3])
    assert found[:, 0, 0, 0].tolist() == pytest.approx([2 * x / 20 - 1 for x in (2, 4, 1)])


def test_inputs_may_be_a_path_and_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    file = tmp_path / "inputs.JSONL"
    file.write_text(json.dumps({"class_labels": 3}))
    sampler = SamplerConfig(inputs=file)  # type: ignore[arg-type]
    assert sampler == SamplerConfig(inputs=str(file))
    assert sampler.inputs_of([5]) == {"class_labels": [3]}
    json.dumps([sampler.identity(), sampler.kept()])
    table = tmp_path / "inputs.csv"
    table.write_text("class_labels\n3\n")
    with pytest.raises(ValueError, match=r"inputs\.csv is no dataset: give \.parquet or \.jsonl"):
        SamplerConfig(inputs=str(table)).check()


def test_an_argument_that_no_file_can_keep_is_named() -> None:
    with pytest.raises(ValueError, match=r"sampler\.arguments\.latents is no plain value") as error:
        SamplerConfig(arguments={"strength": 0.5, "latents": torch.ones(2)}).check()
    assert "\n" not in str(error.value)


def test_a_column_of_videos_gives_a_list_of_images_for_each_seed(tmp_path: Path) -> None:
    videos = [[Image.new("RGB", (2, 2), (i, j, 0)) for j in range(3)] for i in range(2)]
    datasets.Dataset.from_dict({"video": videos}).save_to_disk(tmp_path)
    found = SamplerConfig(inputs=str(tmp_path)).inputs_of([1, 0])["video"]
    assert [[frame.getpixel((0, 0)) for frame in video] for video in found] == [
        [(i, j, 0) for j in range(3)] for i in (1, 0)
    ]


class Captioned(DDPMPipeline):
    """Tells what it was called with."""

    def __call__(
        self,
        prompt: str | list[str],
        image: Image.Image | list[Image.Image],
        negative_prompt: list[str],
        labels: Any,
        generator: Any,
    ) -> Any:
        return prompt, image, negative_prompt, labels


def test_one_image_alone_is_called_with_bare_texts_and_images_where_a_pipeline_takes_them(tmp_path: Path) -> None:
    images = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(2)]
    datasets.Dataset.from_dict({"image": images, "labels": [5, 6]}).save_to_disk(tmp_path)
    pipeline = Captioned(**tiny_pipeline().components)
    sampler = SamplerConfig(prompts=["a", "b"], negative_prompt="", inputs=str(tmp_path))
    prompt, image, negative, labels = generate(pipeline, sampler, [1])
    assert (prompt, image.getpixel((0, 0)), negative, labels) == ("b", (1, 0, 0), [""], [6])
    prompt, image, negative, labels = generate(pipeline, sampler, [0, 1])
    assert (prompt, len(image), negative, labels) == (["a", "b"], 2, ["", ""], [5, 6])


class Careless(DDPMPipeline):
    """Draws without its generator."""

    def __call__(self, prompt: Any, generator: Any) -> Any:
        return torch.rand(len(prompt))


def test_numbers_that_a_pipeline_draws_without_a_generator_depend_on_the_seed() -> None:
    pipeline, sampler = Careless(**tiny_pipeline().components), SamplerConfig(prompts=["a", "b"])
    before = torch.get_rng_state()
    first, again, other = (generate(pipeline, sampler, seeds) for seeds in ([3, 4], [3, 4], [5, 6]))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_inputs_that_are_edited_are_read_again_and_decide_the_images(tmp_path: Path) -> None:
    file = tmp_path / "inputs.jsonl"
    seen = []
    for label in (1, 7):
        file.write_text(json.dumps({"class_labels": label}))
        seen.append((SamplerConfig(inputs=str(file)).inputs_of([0]), SamplerConfig(inputs=str(file)).identity()))
    assert [inputs["class_labels"] for inputs, _ in seen] == [[1], [7]]
    assert seen[0][1] != seen[1][1]
    file.write_text(json.dumps({"class_labels": 1}))
    assert SamplerConfig(inputs=str(file)).identity() == seen[0][1]


def test_a_pipeline_that_takes_no_number_of_steps_is_calibrated_and_judged(tmp_path: Path) -> None:
    class Distilled(DDPMPipeline):
        def __call__(self, batch_size, generator, output_type="np"):  # type: ignore[no-untyped-def]
            return super().__call__(batch_size, generator, num_inference_steps=2, output_type=output_type)

    pipeline = tiny_pipeline()
    pipeline = Distilled(pipeline.unet, pipeline.scheduler)
    fpq.quantize(
        pipeline,
        fpq.Recipe(rounding=fpq.RoundingRecipe(start="nearest")),
        tmp_path / "run",
        fpq.CalibrationDataModule(n_samples=8, n_search=4),
        evaluation=fpq.EvaluationConfig(n_images=2, features=None),
        accelerator="cpu",
    )
    assert json.loads((tmp_path / "run" / "report.json").read_text())["variants"]["quantized"]["psnr"] > 0


def test_a_function_of_the_users_own_samples(tmp_path: Path) -> None:
    def three_channels(pipeline: DDPMPipeline, seeds: list[int]) -> list[Any]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(batch_size=len(seeds), generator=generators, num_inference_steps=4).images  # PIL

    ours, theirs = FunctionSampler(function=three_channels), SamplerConfig(steps=4)
    found = sample(tiny_pipeline(), ours, [3, 5])
    assert torch.allclose(found, sample(tiny_pipeline(), theirs, [3, 5]), atol=1 / 127)  # rounded to 8 bits
    assert ours.identity()["function"].endswith("three_channels")
    sets = [sample_trajectories(tiny_pipeline(), sampler, 8, seed=3).inputs for sampler in (ours, theirs)]
    assert torch.allclose(sets[0]["sample"], sets[1]["sample"], atol=1e-5)
    calibrated = fpq.quantize(
        tiny_pipeline(),
        fpq.Recipe(rounding=fpq.RoundingRecipe(start="nearest")),
        tmp_path / "run",
        fpq.CalibrationDataModule(n_samples=8, n_search=4),
        three_channels,
        accelerator="cpu",
    )
    assert quantized_layers(calibrated.unet)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, r"Labelled needs class_labels: give a dataset with such columns as --sampler\.inputs"),
        ({"arguments": {"mask": 1}}, r"Labelled has no mask: leave it out of sampler\.arguments"),
        (
            {"arguments": {"class_labels": [1]}, "guidance_scale": 2},
            r"no guidance_scale: leave it out",
        ),
        ({"inputs": "none/such"}, r"there is no dataset sampler\.inputs none/such"),
        ({"inputs": "./such"}, r"there is no dataset sampler\.inputs \./such$"),  # whatever the hub would say
    ],
)
def test_arguments_that_do_not_fit_a_pipeline_are_one_clear_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=line) as error:
        sample(labelled(), SamplerConfig(**options), [0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("strength", "steps"), [(None, 7), (0.5, 4), (1.0, 2)])
def test_a_short_trial_makes_two_steps_whatever_share_of_them_a_pipeline_leaves_out(
    strength: float | None, steps: int
) -> None:
    class ImageToImage:
        def __call__(self, image: object, strength: float = 0.3, num_inference_steps: int = 50) -> None: ...

    arguments = {} if strength is None else {"strength": strength}
    short = shortened(cast(Any, ImageToImage()), SamplerConfig(arguments=arguments))
    assert short.steps == steps
    assert min(int(steps * (strength or 0.3)), steps) == 2  # as diffusers counts them
