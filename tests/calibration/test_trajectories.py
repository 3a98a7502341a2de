"""Calibration sets hold what the denoiser sees, and batches are a function of the step."""

from __future__ import annotations

import io
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, ImagePipelineOutput
from models import tiny_pipeline
from PIL import Image
from torch import Tensor

from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.calibration.collector import steps_to_keep, timestep_weights
from fpq_lightning.calibration.disk import load_calibration_set, save_calibration_set
from fpq_lightning.calibration.noised_images import noise_real_images
from fpq_lightning.calibration.recorder import output_sensitivity
from fpq_lightning.calibration.trajectories import sample_trajectories
from fpq_lightning.diffusion.sampling import FunctionSampler, SamplerConfig
from fpq_lightning.training.datamodule import CalibrationDataModule, UnitBatches

SAMPLER = SamplerConfig("DDIMScheduler", steps=4, batch_size=3)


@pytest.fixture(scope="module")
def pipeline() -> DDPMPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def weighted(pipeline: DDPMPipeline) -> CalibrationSet:
    return sample_trajectories(pipeline, SAMPLER, 12, seed=7, weighting="sensitivity")


def _seen_by_the_denoiser(seeds: list[int]) -> list[tuple[int, Tensor]]:
    """An independent run of the pipeline, a batch, with the denoiser's forward replaced."""
    pipeline = tiny_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    seen: list[tuple[int, Tensor]] = []
    forward = pipeline.unet.forward

    def spy(sample: Tensor, timestep: Tensor, *args: object, **kwargs: object) -> object:
        seen.extend((int(timestep), row.clone()) for row in sample)
        return forward(sample, timestep, *args, **kwargs)

    pipeline.unet.forward = spy
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    pipeline(batch_size=len(seeds), generator=generators, num_inference_steps=SAMPLER.steps)  # eta 0
    return seen


def test_the_set_holds_what_hooking_the_denoiser_in_an_independent_run_gives(weighted: CalibrationSet) -> None:
    # 12 samples of 4 steps are 3 trajectories, seeds 7, 8, 9.
    expected = _seen_by_the_denoiser([7, 8, 9])
    unmatched = list(range(len(weighted)))
    for timestep, sample in expected:
        distances = {
            i: (weighted.inputs["sample"][i] - sample).abs().max().item()
            for i in unmatched
            if int(weighted.inputs["timestep"][i]) == timestep
        }
        best = min(distances, key=distances.__getitem__)
        assert distances[best] == 0
        unmatched.remove(best)
    assert unmatched == []


def test_the_same_seed_gives_the_same_set_and_another_one_another(pipeline: DDPMPipeline) -> None:
    a, b, other = (sample_trajectories(pipeline, SAMPLER, 8, seed=s, weighting="sensitivity") for s in (3, 3, 40))
    assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in ("sample", "timestep"))
    assert torch.equal(a.weights, b.weights)
    assert not torch.equal(a.inputs["sample"].sort(0).values, other.inputs["sample"].sort(0).values)


def test_uniform_timesteps_occur_equally_often(weighted: CalibrationSet) -> None:
    counts = Counter(weighted.inputs["timestep"].tolist())
    assert len(counts) == SAMPLER.steps
    assert set(counts.values()) == {3}


@pytest.mark.parametrize("weighting", ["uniform", "late", "early"])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 11])
def test_the_set_has_n_samples_whether_or_not_the_steps_divide_n(pipeline: DDPMPipeline, n: int, weighting) -> None:
    found = sample_trajectories(pipeline, SamplerConfig(steps=4, batch_size=2), n, timesteps=weighting)
    assert len(found) == n
    assert len(found.inputs["sample"]) == len(found.inputs["timestep"]) == n


def test_timesteps_of_a_uniform_set_that_the_steps_do_not_divide_differ_by_at_most_one() -> None:
    for n in range(1, 30):
        counts = Counter(step for kept in steps_to_keep(n, 7, "uniform", seed=n) for step in kept)
        assert sum(counts.values()) == n
        assert max(counts.values()) - min(counts.get(i, 0) for i in range(7)) <= 1


@pytest.mark.parametrize(("weighting", "sign"), [("late", 1), ("early", -1)])
def test_weighted_timesteps_favour_their_end_of_the_trajectory(weighting, sign: int) -> None:
    kept = [step for steps in steps_to_keep(7000, 7, weighting, seed=0) for step in steps]
    counts = np.bincount(kept, minlength=7) / 7000
    assert np.allclose(counts, timestep_weights(weighting, 7).numpy(), atol=0.02)
    assert sign * (counts[-1] - counts[0]) > 0.1


def test_samples_of_one_trajectory_do_not_stand_together(weighted: CalibrationSet) -> None:
    assert weighted.inputs["timestep"].tolist() != sorted(weighted.inputs["timestep"].tolist(), reverse=True)
    assert len(set(weighted.inputs["timestep"][:6].tolist())) > 2


def test_a_tail_is_made_of_whole_trajectories_and_what_comes_first_is_of_many(pipeline: DDPMPipeline) -> None:
    found = sample_trajectories(pipeline, SAMPLER, 36, seed=7).inputs["sample"]
    trajectory = []
    calls = {seed: _seen_by_the_denoiser([seed]) for seed in range(7, 16)}
    for sample in found:
        near = {seed: min((sample - other).abs().max() for _, other in calls[seed]) for seed in calls}
        trajectory.append(min(near, key=near.__getitem__))
    assert Counter(trajectory) == dict.fromkeys(calls, 4)
    assert len(set(trajectory[-4:])) == len(set(trajectory[-8:-4])) == 1
    assert not {*trajectory[:-4]} & {*trajectory[-4:]}
    assert len(set(trajectory[:9])) > 3


def test_sensitivity_weights_are_the_squared_ddim_coefficient_of_the_noise_prediction(
    weighted: CalibrationSet,
) -> None:
    # Linear betas of the DDPM configuration, in float64, with the final alpha_cumprod 1 of DDIM.
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    expected = []
    for t in weighted.inputs["timestep"].tolist():
        previous = t - 1000 // SAMPLER.steps
        a, b = alphas[t], alphas[previous] if previous >= 0 else 1.0
        # x_{t-1} = sqrt(b) (x_t - sqrt(1 - a) eps) / sqrt(a) + sqrt(1 - b) eps
        expected.append((math.sqrt(1 - b) - math.sqrt(b) * math.sqrt(1 - a) / math.sqrt(a)) ** 2)
    expected = np.array(expected) / np.mean(expected)
    assert np.allclose(weighted.weights.double().numpy(), expected, rtol=1e-3)
    assert abs(weighted.weights.mean().item() - 1) < 1e-5
    assert expected.max() > 2 * expected.min()  # the claim would say nothing of equal weights


def test_the_sensitivity_of_half_precision_is_that_of_float32(pipeline: DDPMPipeline) -> None:
    output, sample = (torch.randn(3, 3, 8, 8, dtype=torch.bfloat16) for _ in range(2))
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(SAMPLER.steps)
    for t in scheduler.timesteps:
        half, whole = (
            output_sensitivity(scheduler, (x, t, y), {})
            for x, y in ((output, sample), (output.float(), sample.float()))
        )
        assert torch.allclose(half, whole, rtol=1e-3)
        assert (half > 0).all()


def test_uniform_weights_are_one(pipeline: DDPMPipeline) -> None:
    assert torch.equal(sample_trajectories(pipeline, SAMPLER, 6, weighting="uniform").weights, torch.ones(6))


def test_measuring_the_sensitivity_leaves_the_scheduler_and_the_trajectory_as_they_are(
    weighted: CalibrationSet,
) -> None:
    pipeline = tiny_pipeline()
    plain = sample_trajectories(pipeline, SAMPLER, 12, seed=7, weighting="uniform")
    assert torch.equal(plain.inputs["sample"], weighted.inputs["sample"])
    step = type(pipeline.scheduler).step
    sample_trajectories(pipeline, SAMPLER, 4, weighting="sensitivity")
    assert pipeline.scheduler.step.__func__ is step
    assert "step" not in vars(pipeline.scheduler)
    assert not pipeline.unet._forward_pre_hooks


def _break(pipeline: DDPMPipeline) -> DDPMPipeline:
    with torch.no_grad():
        pipeline.unet.conv_out.weight[0, 0, 0, 0] = torch.nan
    return pipeline


def test_a_model_that_gives_nan_is_refused_and_left_unhooked() -> None:
    pipeline = _break(tiny_pipeline())
    with pytest.raises(ValueError, match="NaN or Inf") as error:
        sample_trajectories(pipeline, SAMPLER, 4, weighting="sensitivity")
    assert "\n" not in str(error.value)
    assert "step" not in vars(pipeline.scheduler)
    assert not pipeline.unet._forward_pre_hooks


@pytest.mark.parametrize("weighting", ["uniform", "sensitivity"])
def test_a_model_that_gives_nan_in_its_last_step_only_is_refused(weighting: Any) -> None:
    pipeline = tiny_pipeline()
    forward = pipeline.unet.forward

    def last_is_nan(sample: Tensor, timestep: Tensor, *args: object, **kwargs: object) -> object:
        output = forward(sample, timestep, *args, **kwargs)
        if int(timestep) == 0:
            output.sample.fill_(torch.nan)
        return output

    pipeline.unet.forward = last_is_nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        sample_trajectories(pipeline, SAMPLER, 8, weighting=weighting)


def test_a_pixel_pipeline_in_bfloat16_is_one_clear_line() -> None:
    pipeline = tiny_pipeline()
    pipeline.unet.to(torch.bfloat16)
    with pytest.raises(ValueError, match="DDPMPipeline cannot make images of a bfloat16 model: load it in float32"):
        sample_trajectories(pipeline, SAMPLER, 4)


class OnePrompt(DDPMPipeline):
    """Takes one prompt in a call, of which it makes several images."""

    def __call__(
        self,
        prompt: list[str],
        generator: Any,
        num_inference_steps: int,
        num_images_per_prompt: int = 1,
        output_type: str = "np",
    ) -> Any:
        (_,) = prompt
        return super().__call__(num_images_per_prompt, generator, num_inference_steps, output_type)


def one_prompt() -> OnePrompt:
    return OnePrompt(**tiny_pipeline().components)


def test_a_pipeline_that_takes_one_prompt_in_a_call_gives_what_one_for_many_gives(pipeline: DDPMPipeline) -> None:
    sampler = replace(SAMPLER, batch_size=1)
    expected = sample_trajectories(pipeline, sampler, 8, seed=3)
    found = sample_trajectories(one_prompt(), replace(sampler, prompts=["a", "b"]), 8, seed=3)
    assert torch.equal(found.inputs["sample"], expected.inputs["sample"])
    assert torch.equal(found.inputs["timestep"], expected.inputs["timestep"])


class OneInput(DDPMPipeline):
    """Takes one image for all of its prompts."""

    def __call__(
        self, prompt: str | list[str], image: Image.Image, generator: Any, num_inference_steps: int, output_type: str
    ) -> Any:
        assert isinstance(image, Image.Image)
        n = 1 if isinstance(prompt, str) else len(prompt)
        return super().__call__(n, generator, num_inference_steps, output_type)


def test_a_pipeline_that_takes_one_input_for_all_prompts_gives_what_one_for_many_gives(
    pipeline: DDPMPipeline, tmp_path: Path
) -> None:
    images = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(2)]
    datasets.Dataset.from_dict({"image": images}).save_to_disk(tmp_path)
    sampler = replace(SAMPLER, batch_size=1)
    given = replace(sampler, prompts=["a", "b"], inputs=str(tmp_path))
    expected = sample_trajectories(pipeline, sampler, 8, seed=3)
    found = sample_trajectories(OneInput(**tiny_pipeline().components), given, 8, seed=3)
    assert torch.equal(found.inputs["sample"], expected.inputs["sample"])


class References(DDPMPipeline):
    """Takes images as references of all prompts: with each of them the sample grows."""

    @torch.no_grad()
    def __call__(self, prompt: Any, image: Any, generator: Any, num_inference_steps: int) -> ImagePipelineOutput:
        width = 8 * (len(image) if isinstance(image, list) else 1)
        sample = torch.cat([torch.randn(1, 3, 8, width, generator=g) for g in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            sample = self.scheduler.step(self.unet(sample, t).sample, t, sample).prev_sample
        return ImagePipelineOutput(sample.movedim(1, -1).numpy())


def test_images_that_all_prompts_refer_to_are_no_batch(pipeline: DDPMPipeline, tmp_path: Path) -> None:
    images = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(2)]
    datasets.Dataset.from_dict({"image": images}).save_to_disk(tmp_path)
    sampler = replace(SAMPLER, prompts=["a", "b"], inputs=str(tmp_path))
    references = References(**tiny_pipeline().components)
    with pytest.raises(ValueError, match=r"References does not make 2 images in a call .*: set sampler.batch_size 1"):
        sample_trajectories(references, sampler, 8, seed=3)
    found = sample_trajectories(references, replace(sampler, batch_size=1), 8, seed=3)
    expected = sample_trajectories(pipeline, replace(SAMPLER, batch_size=1), 8, seed=3)
    assert torch.equal(found.inputs["sample"], expected.inputs["sample"])


def test_batches_of_a_pipeline_that_takes_one_prompt_in_a_call_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"OnePrompt does not make 2 images in a call .*: set sampler.batch_size 1"):
        sample_trajectories(one_prompt(), replace(SAMPLER, prompts=["a", "b"]), 8)


class Alone(DDPMPipeline):
    """Makes one image, whatever it is asked for."""

    @torch.no_grad()
    def __call__(
        self, generator: list[torch.Generator], num_inference_steps: int, output_type: str
    ) -> ImagePipelineOutput:
        (_,) = generator
        return super().__call__(1, generator, num_inference_steps, output_type)


def one_by_one(pipeline: DDPMPipeline, seeds: list[int]) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return np.concatenate([pipeline(1, g, SAMPLER.steps, output_type="np").images for g in generators])


@pytest.mark.parametrize(
    ("one", "sampler"),
    [(Alone, SAMPLER), (DDPMPipeline, FunctionSampler("DDIMScheduler", function=one_by_one))],
    ids=["a pipeline", "a function"],
)
def test_what_never_makes_two_images_in_a_call_gives_what_a_batch_gives(
    pipeline: DDPMPipeline, one: type[DDPMPipeline], sampler: SamplerConfig
) -> None:
    alone = one(**tiny_pipeline().components)
    expected = sample_trajectories(pipeline, replace(SAMPLER, batch_size=1), 8, seed=3)
    found = sample_trajectories(alone, replace(sampler, batch_size=1), 8, seed=3)
    assert torch.equal(found.inputs["sample"], expected.inputs["sample"])
    assert torch.equal(found.inputs["timestep"], expected.inputs["timestep"])
    assert torch.equal(found.weights, expected.weights)
    with pytest.raises(ValueError, match=r"does not make 2 images in a call .*: set sampler.batch_size 1"):
        sample_trajectories(alone, replace(sampler, batch_size=2), 8, seed=3)


@pytest.mark.parametrize("n", [0, -1])
def test_an_empty_set_is_refused_before_sampling(pipeline: DDPMPipeline, n: int) -> None:
    with pytest.raises(ValueError, match="empty"):
        sample_trajectories(pipeline, SAMPLER, n)
    with pytest.raises(ValueError, match="empty"):
        CalibrationDataModule(n_samples=n)


# --- on disk ---------------------------------------------------------------------------------------------------


def test_a_set_survives_the_disk_bit_for_bit_as_a_datasets_dataset(weighted: CalibrationSet, tmp_path: Path) -> None:
    original = CalibrationSet(
        {**weighted.inputs, "label": torch.arange(12), "text": torch.randn(12, 5)},
        weighted.weights,
        {"return_dict": False, "scale": 1.5},
    )
    original.inputs["sample"] = original.inputs["sample"].clone()
    original.inputs["sample"][0, 0, 0, :3] = torch.tensor([1e-42, -0.0, 3e38])
    save_calibration_set(original, tmp_path / "set")
    dataset = datasets.load_from_disk(str(tmp_path / "set"))
    assert len(dataset) == 12
    assert {"sample", "timestep", "label", "text"} <= set(dataset.column_names)
    found = load_calibration_set(tmp_path / "set")
    assert found.inputs.keys() == original.inputs.keys()
    for name, value in original.inputs.items():
        assert found.inputs[name].dtype == value.dtype
        assert found.inputs[name].shape == value.shape
        assert found.inputs[name].numpy().tobytes() == value.contiguous().numpy().tobytes()
    assert found.constants == original.constants
    assert torch.equal(found.weights, original.weights)


def test_a_set_in_bfloat16_survives_the_disk(tmp_path: Path) -> None:
    inputs = {"sample": torch.randn(5, 2, 3).bfloat16(), "timestep": torch.arange(5)}
    save_calibration_set(CalibrationSet(inputs, torch.ones(5), {"flag": True}), tmp_path / "set")
    found = load_calibration_set(tmp_path / "set")
    assert found.constants == {"flag": True}
    for name, value in inputs.items():
        assert found.inputs[name].dtype == value.dtype
        assert torch.equal(found.inputs[name], value)


def test_a_set_with_a_tensor_that_all_samples_share_survives_the_disk(tmp_path: Path) -> None:
    # Such as the position ids of transformers.
    ids = torch.arange(12.0).reshape(4, 3)
    original = CalibrationSet({"sample": torch.randn(6, 2)}, torch.ones(6), {"img_ids": ids})
    save_calibration_set(original, tmp_path / "set")
    found = load_calibration_set(tmp_path / "set")
    assert torch.equal(found.constants["img_ids"], ids)
    assert torch.equal(found.inputs["sample"], original.inputs["sample"])


def test_an_empty_set_on_disk_is_one_clear_line(tmp_path: Path) -> None:
    empty = {"sample": [], "timestep": [], "sample_weight": []}
    datasets.Dataset.from_dict(empty).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ValueError, match="delete it") as error:
        load_calibration_set(tmp_path / "set")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "no state", "garbage", "other dataset"])
def test_a_damaged_set_is_one_clear_line(weighted: CalibrationSet, tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "set"
    if damage == "other dataset":
        datasets.Dataset.from_dict({"a": [1, 2]}).save_to_disk(str(directory))
    else:
        save_calibration_set(weighted, directory)
        arrow = next(directory.glob("*.arrow"))
        if damage == "truncated":
            arrow.write_bytes(arrow.read_bytes()[:2000])
        elif damage == "garbage":
            arrow.write_bytes(b"garbage" * 1000)
        else:
            (directory / "state.json").unlink()
    with pytest.raises(ValueError, match="delete it") as error:
        load_calibration_set(directory)
    assert str(directory) in str(error.value)
    assert "\n" not in str(error.value)


def _flip(file: Path, place: int) -> None:
    contents = bytearray(file.read_bytes())
    contents[place] ^= 1
    file.write_bytes(contents)


@pytest.mark.parametrize("name", ["*.arrow", "dataset_info.json", "tensors.safetensors"])
def test_a_flipped_bit_of_a_set_is_found_and_its_file_named(
    weighted: CalibrationSet, tmp_path: Path, name: str
) -> None:
    shared = CalibrationSet(weighted.inputs, weighted.weights, {"ids": torch.arange(4.0)})
    save_calibration_set(shared, tmp_path / "set")
    file = next((tmp_path / "set").glob(name))
    _flip(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged.*: delete it$") as error:
        load_calibration_set(tmp_path / "set")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_set_with_weights_that_cannot_be_is_refused(weighted: CalibrationSet, tmp_path: Path, value: float) -> None:
    weights = weighted.weights.clone()
    weights[3] = value
    save_calibration_set(CalibrationSet(weighted.inputs, weights), tmp_path / "set")
    with pytest.raises(ValueError, match=r"a sample's weight is no positive number\): delete it"):
        load_calibration_set(tmp_path / "set")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["column", "list", "constant"])
def test_a_set_with_numbers_that_are_not_finite_is_refused_by_the_name_of_the_input(
    tmp_path: Path, place: str, value: float
) -> None:
    broken = torch.tensor([1.0, value])
    inputs = {"sample": torch.randn(2, 3), "text": [torch.zeros(2), torch.zeros(3)]}
    constants = {"ids": broken if place == "constant" else torch.zeros(2)}
    if place == "column":
        inputs["sample"][1, 2] = value
    elif place == "list":
        inputs["text"][0] = broken
    save_calibration_set(CalibrationSet(inputs, torch.ones(2), constants), tmp_path / "set")
    name = {"column": "sample", "list": "text", "constant": "ids"}[place]
    with pytest.raises(ValueError, match=rf"\({name} holds NaN or Inf\): delete it"):
        load_calibration_set(tmp_path / "set")


def test_a_set_with_a_mask_of_attention_in_minus_infinity_is_read(tmp_path: Path) -> None:
    mask = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
    save_calibration_set(CalibrationSet({"mask": mask, "sample": torch.randn(2, 3)}, torch.ones(2)), tmp_path / "set")
    assert torch.equal(load_calibration_set(tmp_path / "set").inputs["mask"], mask)


def test_samples_whose_errors_do_not_reach_the_image_keep_a_weight_that_is_read(
    pipeline: DDPMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fpq_lightning.calibration.recorder.output_sensitivity",
        lambda scheduler, arguments, options: (arguments[0].flatten(1).sum(1) * 0 + (int(arguments[1]) > 400)).cpu(),
    )
    found = sample_trajectories(pipeline, SAMPLER, 12, seed=7, weighting="sensitivity")
    assert found.weights.min() > 0
    assert (found.weights < 1e-30).sum() == 6
    save_calibration_set(found, tmp_path / "set")
    assert torch.equal(load_calibration_set(tmp_path / "set").weights, found.weights)


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_set_with_what_is_no_file_of_its_own_is_refused(weighted: CalibrationSet, tmp_path: Path, kind: str) -> None:
    save_calibration_set(weighted, tmp_path / "set")
    file = tmp_path / "set" / "tensors.safetensors"
    file.rename(tmp_path / "outside")
    os.mkfifo(file) if kind == "pipe" else file.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="is a pipe" if kind == "pipe" else "leads out of"):
        load_calibration_set(tmp_path / "set")


def test_a_set_of_an_older_version_has_no_digests_and_is_read(weighted: CalibrationSet, tmp_path: Path) -> None:
    save_calibration_set(weighted, tmp_path / "set")
    (tmp_path / "set" / "digests.json").unlink()
    assert torch.equal(load_calibration_set(tmp_path / "set").weights, weighted.weights)


def test_a_missing_set_is_a_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no calibration set"):
        load_calibration_set(tmp_path / "none")


# --- real images -----------------------------------------------------------------------------------------------


def _parquet(file: Path, n: int = 3, size: int = 8) -> tuple[str, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    images = [{"bytes": _png(p), "path": None} for p in pixels]
    features = datasets.Features({"picture": datasets.Image()})
    datasets.Dataset.from_dict({"picture": images}, features=features).to_parquet(str(file))
    return str(file), pixels


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def test_real_images_are_noised_to_their_timesteps_as_the_forward_process_says(
    pipeline: DDPMPipeline, tmp_path: Path
) -> None:
    source, pixels = _parquet(tmp_path / "images.parquet")
    found = noise_real_images(pipeline, source, "picture", 200, seed=1)
    assert len(found) == 200
    timestep = found.inputs["timestep"]
    assert timestep.min() >= 0
    assert timestep.max() < 1000
    assert len(timestep.unique()) > 100
    alphas = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[timestep].reshape(-1, 1, 1, 1)
    clean = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 127.5 - 1
    # Of the three images the one that was noised leaves noise of the right size.
    noise = (found.inputs["sample"].double()[:, None] - alphas.sqrt()[:, None] * clean) / (1 - alphas).sqrt()[:, None]
    spread = noise.flatten(2).std(2).sub(1).abs().min(1).values
    assert spread.max() < 0.3
    chosen = noise.flatten(2).std(2).sub(1).abs().argmin(1)
    mean = noise[torch.arange(200), chosen].mean()
    assert abs(mean.item()) < 0.05
    again = noise_real_images(pipeline, source, "picture", 200, seed=1)
    assert torch.equal(again.inputs["sample"], found.inputs["sample"])


def test_real_images_of_another_size_are_resized_to_that_of_the_model(pipeline: DDPMPipeline, tmp_path: Path) -> None:
    source, _ = _parquet(tmp_path / "images.parquet", size=20)
    assert noise_real_images(pipeline, source, "picture", 4).inputs["sample"].shape == (4, 3, 8, 8)


def test_a_wrong_image_column_is_refused_with_the_columns_there_are(pipeline: DDPMPipeline, tmp_path: Path) -> None:
    source, _ = _parquet(tmp_path / "images.parquet")
    with pytest.raises(ValueError, match=r"no column 'image'; it has picture") as error:
        noise_real_images(pipeline, source, "image", 4)
    assert "\n" not in str(error.value)


def test_a_missing_parquet_file_is_one_clear_line(pipeline: DDPMPipeline, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no dataset of images") as error:
        noise_real_images(pipeline, str(tmp_path / "none.parquet"), "image", 4)
    assert "\n" not in str(error.value)


# --- batches ---------------------------------------------------------------------------------------------------


def _steps(batches: UnitBatches) -> list[list[int]]:
    return [row.tolist() for batch in batches for row in batch]


def test_batches_hold_as_many_steps_as_asked_of_valid_samples() -> None:
    batches = UnitBatches(seed=1, unit=2, n=50, batch_size=6, steps=25)
    rows = _steps(batches)
    assert len(rows) == 25
    assert {len(row) for row in rows} == {6}
    assert {0 <= i < 50 for row in rows for i in row} == {True}
    assert len({i for row in rows for i in row}) > 40
    assert [len(batch) for batch in batches] == [10, 10, 5]


def test_step_i_depends_only_on_seed_unit_and_i() -> None:
    rows = _steps(UnitBatches(1, 2, 50, 6, 25))
    assert _steps(UnitBatches(1, 2, 50, 6, 25)) == rows
    assert _steps(UnitBatches(1, 2, 50, 6, 13)) == rows[:13]
    torch.manual_seed(99)
    np.random.seed(99)
    fresh = UnitBatches(1, 2, 50, 6, 25)
    assert [fresh.step(i).tolist() for i in reversed(range(25))] == rows[::-1]
    assert _steps(UnitBatches(2, 2, 50, 6, 25)) != rows
    assert _steps(UnitBatches(1, 3, 50, 6, 25)) != rows
    assert len({tuple(row) for row in rows}) == 25


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_loader_restored_from_its_state_goes_on_where_the_first_one_was(done: int) -> None:
    rows = [batch.tolist() for batch in UnitBatches(1, 2, 50, 6, 25)]
    interrupted = UnitBatches(1, 2, 50, 6, 25)
    iterator = iter(interrupted)
    for _ in range(done):
        next(iterator)
    resumed = UnitBatches(1, 2, 50, 6, 25)
    resumed.load_state_dict(interrupted.state_dict())
    assert [batch.tolist() for batch in resumed] == rows[done:]
    assert [batch.tolist() for batch in resumed] == rows  # the next epoch starts anew


def test_a_unit_without_steps_has_one_empty_batch() -> None:
    batches = list(UnitBatches(1, 2, 50, 6, 0))
    assert len(batches) == len(UnitBatches(1, 2, 50, 6, 0)) == 1
    assert len(batches[0]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n_samples": 3}, "at least 4"), ({"held_out_fraction": 0.0}, "held_out"), ({"store_budget": "x"}, "4GiB")],
)
def test_unusable_options_of_the_data_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibrationDataModule(**options)
