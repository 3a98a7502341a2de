"""Videos and sounds: their metrics are those of numpy, scipy and transformers; commands keep, judge and show them."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.linalg
import torch
from diffusers import DDPMPipeline
from models import CHECKOUT, fit_arguments, tiny_pipeline, tiny_text_to_image
from PIL import Image
from scipy.io import wavfile
from torch import Tensor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

import fpq_lightning as fpq
from fpq_lightning.cli import main
from fpq_lightning.evaluation.metrics import METRICS
from fpq_lightning.evaluation.networks.cifar10 import CIFAR10Network
from fpq_lightning.evaluation.quality import QualityMetrics
from fpq_lightning.evaluation.report.files import write_reports

N, FRAMES, RATE = 5, 4, 16000
DRAW = torch.Generator().manual_seed(0)
VIDEOS = torch.rand(N, FRAMES, 3, 32, 32, generator=DRAW) * 2 - 1
BLURRED = VIDEOS * 0.9
FLICKERING = VIDEOS * 0.8 + 0.1 * torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(1, 4, 1, 1, 1)
SOUNDS = torch.randn(N, 2, 4000, generator=DRAW) * torch.tensor([0.2, 0.05]).reshape(2, 1)
NOISY = SOUNDS + torch.randn(N, 2, 4000, generator=DRAW) * 0.02
FEATURES = CHECKOUT / "data" / "cifar10-features"


def _measured(
    found: Tensor, reference: Tensor, networks: dict[str, Any] | None = None, **options: Any
) -> dict[str, float | None]:
    metrics = QualityMetrics(fpq.EvaluationConfig(features=None), networks)
    metrics.update(found, reference, **options)
    return {key: value for key, value in metrics.compute().items() if value is not None}


# --- videos ----------------------------------------------------------------------------------------------------


def test_psnr_of_a_video_is_the_mean_over_its_frames() -> None:
    found = _measured(FLICKERING, VIDEOS)
    errors = np.square((FLICKERING - VIDEOS).double().numpy()).mean(axis=(2, 3, 4))
    assert found["psnr"] == pytest.approx(np.mean(10 * np.log10(4 / errors)), rel=1e-5)


def test_ssim_of_videos_is_that_of_their_frames_as_images() -> None:
    frames = [_measured(FLICKERING[:, i], VIDEOS[:, i])["ssim"] for i in range(FRAMES)]
    assert _measured(FLICKERING, VIDEOS)["ssim"] == pytest.approx(np.mean(frames), rel=1e-5)


def test_distances_of_videos_are_those_of_the_sets_of_all_frames() -> None:
    network = CIFAR10Network.load(FEATURES)
    found = _measured(FLICKERING, VIDEOS, {"features": network})
    with torch.no_grad():
        a, b = (network(x.reshape(-1, 3, 32, 32)).double().numpy() for x in (FLICKERING, VIDEOS))
    s, t = np.cov(a.T), np.cov(b.T)
    eigenvalues = scipy.linalg.eigvals(s @ t)
    expected = (
        np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + t) - 2 * np.sqrt(eigenvalues.astype(complex)).real.sum()
    )
    assert found["fd"] == pytest.approx(expected, rel=1e-3)
    assert found["precision"] is not None  # needs four in each set


def test_prompts_of_videos_are_those_of_each_frame() -> None:
    class Named(CIFAR10Network):
        def describe(self, images: Tensor) -> dict[str, Tensor]:
            logits = torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 10).float()  # the pixel is the class
            return {"pooled": images.mean((2, 3)).repeat(1, 86)[:, :256], "logits": logits}

    videos = torch.zeros(2, 3, 3, 8, 8)
    videos[0] += 3  # a cat in each frame
    videos[1, 0] += 5  # a dog in the first frame
    found = _measured(videos, videos, {"features": Named()}, prompts=["a cat", "a dog"])
    assert found["class_accuracy"] == pytest.approx(4 / 6)


def test_the_frame_difference_is_the_mean_over_neighbours_in_levels() -> None:
    expected = np.abs(np.diff(FLICKERING.double().numpy(), axis=1)).mean() * 255 / 2
    assert _measured(FLICKERING, VIDEOS)["frame_difference"] == pytest.approx(expected, rel=1e-5)


def test_dtssd_compares_the_changes_between_frames_and_not_the_frames() -> None:
    x, y = ((v.double().numpy() + 1) / 2 for v in (FLICKERING, VIDEOS))
    roots = np.sqrt(np.square(np.diff(x, axis=1) - np.diff(y, axis=1)).mean(axis=(2, 3, 4)))
    assert _measured(FLICKERING, VIDEOS)["dtssd"] == pytest.approx(roots.mean(), rel=1e-5)
    darker = _measured(VIDEOS - 0.5, VIDEOS)
    assert darker["dtssd"] == pytest.approx(0, abs=1e-6)
    assert darker["psnr"] < 20


def test_videos_that_are_judged_in_parts_have_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _measured(FLICKERING, VIDEOS)
    monkeypatch.setattr("fpq_lightning.evaluation.quality._BATCH", FRAMES + 1)  # a video at a time
    assert _measured(FLICKERING, VIDEOS) == pytest.approx(whole, rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_a_video_of_one_frame_is_judged_as_an_image() -> None:
    assert _measured(BLURRED[:, :1], VIDEOS[:, :1]) == pytest.approx(_measured(BLURRED[:, 0], VIDEOS[:, 0]))


# --- sound -----------------------------------------------------------------------------------------------------


def test_snr_is_the_mean_over_sounds_of_the_ratio_of_energies() -> None:
    signal, noise = (np.square(x.numpy()).sum(axis=(1, 2)) for x in (SOUNDS.double(), NOISY.double() - SOUNDS.double()))
    expected = pytest.approx(np.mean(10 * np.log10(signal / noise)), rel=1e-5)
    assert _measured(NOISY, SOUNDS, sampling_rate=RATE)["snr"] == expected
    assert _measured(NOISY / 4096, SOUNDS / 4096, sampling_rate=RATE)["snr"] == expected  # however quiet


@pytest.mark.parametrize("rate", [16, 4000, RATE, 44100])
def test_the_log_mel_distance_is_that_of_the_spectrograms_of_transformers(rate: int) -> None:
    window = {16: 256, 4000: 256, RATE: 1024, 44100: 2048}[rate]
    filters = mel_filter_bank(window // 2 + 1, 64, 0.0, rate / 2, rate)

    def decibels(sound: np.ndarray) -> np.ndarray:
        return spectrogram(
            sound, window_function(window, "hann"), window, window // 4, power=2.0, pad_mode="constant",
            mel_filters=filters, mel_floor=1e-10, log_mel="dB",
        )  # fmt: skip

    distances = [
        np.sqrt(np.square(decibels(a) - decibels(b)).mean(axis=0)).mean()
        for a, b in zip(
            NOISY.double().numpy().reshape(-1, 4000), SOUNDS.double().numpy().reshape(-1, 4000), strict=True
        )
    ]
    assert _measured(NOISY, SOUNDS, sampling_rate=rate)["log_mel"] == pytest.approx(np.mean(distances), rel=1e-3)


def test_sounds_shorter_than_a_window_have_a_distance() -> None:
    assert _measured(NOISY[..., :9], SOUNDS[..., :9], sampling_rate=RATE)["log_mel"] > 0


# --- what fits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "reference", "keys"),
    [
        (FLICKERING, VIDEOS, {"psnr", "ssim", "dtssd", "frame_difference"}),
        (BLURRED[:, 0], VIDEOS[:, 0], {"psnr", "ssim"}),
        (NOISY, SOUNDS, {"snr", "log_mel"}),
        (NOISY.flatten(1), SOUNDS.flatten(1), {"snr_latents"}),
    ],
)
def test_only_metrics_of_their_kind_are_measured(found: Tensor, reference: Tensor, keys: set[str]) -> None:
    assert _measured(found, reference, sampling_rate=RATE).keys() == keys
    alone = {column.key for metric in METRICS if not metric.needs_reference for column in metric.columns}
    other_seeds = _measured(found, reference, same_seeds=False, sampling_rate=RATE)
    assert other_seeds.keys() == keys & alone


def test_videos_of_another_length_than_the_reference_are_refused() -> None:
    with pytest.raises(ValueError, match=r"videos of \(2, 3, 32, 32\) cannot be compared .* make videos of the same"):
        _measured(VIDEOS[:, :2], VIDEOS)


def test_sounds_that_are_not_finite_are_counted() -> None:
    broken = NOISY.clone()
    broken[2, 0, 7] = torch.inf
    assert _measured(broken, SOUNDS, sampling_rate=RATE) == {"not_finite": 1}


# --- reports ---------------------------------------------------------------------------------------------------


def _embedded(page: str, kind: str) -> list[bytes]:
    return [base64.b64decode(text) for text in re.findall(rf'src="data:{kind};base64,([^"]+)"', page)]


def _written(directory: Path, samples: dict[str, Tensor], **values: float) -> str:
    variants = {name: {**values, "n_images": N} for name in samples}
    write_reports(directory, {"model": "m", "versions": {}, "variants": variants}, samples, RATE)
    return (directory / "report.html").read_text()


def test_the_report_shows_videos_side_by_side_in_one_animated_picture(tmp_path: Path) -> None:
    colors = {"full_precision": -1.0, "nearest": 0.0, "quantized": 1.0}
    still = torch.ones(N, 40, 3, 16, 24)
    still[:, 1::2] *= 0.5  # something that moves
    page = _written(tmp_path, {name: still * color for name, color in colors.items()}, psnr=1.0)
    assert "<h2>Video quality</h2>" in page
    assert "full precision, nearest rounding, quantized" in page
    (clip,) = _embedded(page, "image/webp")
    with Image.open(io.BytesIO(clip)) as image:
        assert image.n_frames == 32  # four seconds
        assert image.size == (3 * (24 + 4), 3 * 16)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert [round(pixels[8, 12 + 28 * i].mean() / 10) for i in range(3)] == [0, 13, 26]
    assert Image.open(tmp_path / "samples.png").width > Image.open(tmp_path / "samples.png").height
    assert "## Videos" in (tmp_path / "report.md").read_text()
    assert "| videos |" in (tmp_path / "report.md").read_text()


def test_large_videos_are_shown_small(tmp_path: Path) -> None:
    page = _written(
        tmp_path, {"full_precision": torch.zeros(2, 2, 3, 300, 700), "quantized": VIDEOS.new_ones(2, 2, 3, 300, 700)}
    )
    (clip,) = _embedded(page, "image/webp")
    assert Image.open(io.BytesIO(clip)).size == (2 * (233 + 4), 2 * 100)


def test_the_report_plays_the_beginnings_of_sounds(tmp_path: Path) -> None:
    long = torch.linspace(-1, 1, 5 * RATE).expand(N, 1, -1) * torch.arange(1, N + 1).reshape(N, 1, 1) / N
    page = _written(tmp_path, {"full_precision": long, "quantized": -long}, snr=1.0)
    players = _embedded(page, "audio/wav")
    assert page.count("<audio controls") == len(players) == 2 * 3
    for i, player in enumerate(players):
        rate, found = wavfile.read(io.BytesIO(player))
        expected = (long if i % 2 == 0 else -long)[i // 2, 0, : 4 * RATE].double().numpy() * 32768
        assert rate == RATE
        assert found.shape == (4 * RATE,)
        assert np.abs(found - expected.clip(max=32767)).max() <= 0.51
    (picture,) = _embedded(page, "image/png")
    assert Image.open(io.BytesIO(picture)).format == "PNG"
    assert (tmp_path / "samples.png").is_file()
    assert json.loads((tmp_path / "report.json").read_text())["sampling_rate"] == RATE


def test_a_report_of_latents_has_a_table_and_no_pictures(tmp_path: Path) -> None:
    page = _written(tmp_path, {"full_precision": torch.ones(N, 7), "quantized": torch.ones(N, 7)}, snr_latents=12.3)
    assert "<td>12.30</td>" in page
    assert "<img" not in page
    assert "samples.png" not in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "samples.png").exists()


# --- commands --------------------------------------------------------------------------------------------------


def _video_pipeline(directory: Path) -> tuple[str, list[str]]:
    images = diffusers.StableDiffusionPipeline.from_pretrained(tiny_text_to_image(directory / "images"))
    torch.manual_seed(0)
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 8), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4
    )
    parts = (images.vae, images.text_encoder, images.tokenizer, images.unet, adapter, images.scheduler)
    diffusers.AnimateDiffPipeline(*parts).save_pretrained(directory / "video")
    return str(directory / "video"), ["--sampler.prompts=['a cat','a dog']", "--sampler.arguments={num_frames: 3}"]


def _sound_pipeline(directory: Path) -> tuple[str, list[str]]:
    torch.manual_seed(0)
    unet = diffusers.UNet1DModel(
        block_out_channels=(32, 32), down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
        up_block_types=("UpBlock1D", "UpBlock1DNoSkip"), layers_per_block=1, sample_size=512, sample_rate=4000,
        extra_in_channels=64,
    )  # fmt: skip
    diffusers.DanceDiffusionPipeline(unet, diffusers.IPNDMScheduler()).save_pretrained(directory / "sound")
    return str(directory / "sound"), []


@dataclass
class Commands:
    """What ``fit``, ``test`` and ``predict`` wrote for one model."""

    root: Path
    suffix: str

    def report(self, name: str) -> dict[str, Any]:
        return json.loads((self.root / name / "report.json").read_text())

    def files(self, directory: Path) -> list[Any]:
        """What an independent reader finds in the files of a directory."""
        files = sorted(directory.glob(f"*{self.suffix}"))
        return [self._read(file) for file in files]

    def _read(self, file: Path) -> np.ndarray:
        if self.suffix == ".wav":
            rate, samples = wavfile.read(file)
            assert rate == 4000
            return samples / 32768
        with Image.open(file) as image:
            frames = []
            for i in range(image.n_frames):
                image.seek(i)
                frames.append(np.asarray(image.convert("RGB")))
        return np.stack(frames) / 127.5 - 1


@pytest.fixture(scope="module", params=["video", "sound"])
def commands(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    root = tmp_path_factory.mktemp(request.param)
    model, options = (_video_pipeline if request.param == "video" else _sound_pipeline)(root)
    quantized, common = f"--model={root / 'fit' / 'quantized'}", ["--trainer.accelerator=cpu"]
    main([*fit_arguments(model, root / "fit", iterations=1, n_images=2), "--recipe.rounding.learned=false", *options])
    main(["test", quantized, "--evaluation.n_images=2", f"--output={root / 'test'}", *common])
    main(["predict", quantized, "--n_images=2", f"--output={root / 'predict'}", *common])
    return Commands(root, {"video": ".webp", "sound": ".wav"}[request.param])


def test_what_was_fit_is_judged_by_the_metrics_of_its_kind(commands: Commands) -> None:
    variants = commands.report("fit")["variants"]
    measured = {key for key, value in variants["quantized"].items() if value is not None}
    if commands.suffix == ".wav":
        assert measured == {"snr", "log_mel", "n_images", "seeds"}
    else:
        assert measured >= {"psnr", "ssim", "fd", "dtssd", "frame_difference"}
        assert "snr" not in measured
        assert variants["full_precision"]["frame_difference"] > 0
    assert commands.report("fit")["medium"] == {".wav": "sound", ".webp": "video"}[commands.suffix]


def test_numbers_of_a_run_are_those_of_its_files(commands: Commands) -> None:
    images = commands.root / "fit" / "images"
    (directory,) = images.glob("quantized-*")
    found, expected = commands.files(directory), commands.files(images / "full_precision")[:2]
    values = commands.report("fit")["variants"]["quantized"]
    noise = [np.square(a - b) for a, b in zip(found, expected, strict=True)]
    if commands.suffix == ".wav":
        ratios = [10 * np.log10(np.square(b).sum() / n.sum()) for b, n in zip(expected, noise, strict=True)]
        assert values["snr"] == pytest.approx(np.mean(ratios), rel=1e-4)
    else:
        ratios = [10 * np.log10(4 / n.mean(axis=(1, 2, 3))) for n in noise]
        assert found[0].shape == (3, 16, 16, 3)
        assert values["psnr"] == pytest.approx(np.mean(ratios), rel=1e-4)


def test_test_and_predict_give_what_the_run_gave(commands: Commands) -> None:
    (directory,) = (commands.root / "fit" / "images").glob("quantized-*")
    expected = commands.files(directory)
    for place in (commands.root / "test" / "images" / "quantized", commands.root / "predict"):
        found = commands.files(place)
        assert len(found) == 2
        for a, b in zip(found, expected, strict=True):
            assert np.abs(a - b).max() <= 2 / 255 + 1e-6
    key = "snr" if commands.suffix == ".wav" else "psnr"
    before, after = (commands.report(name)["variants"]["quantized"][key] for name in ("fit", "test"))
    assert after == pytest.approx(before, rel=1e-2)


def test_reports_of_commands_hold_the_clip_or_the_sound(commands: Commands) -> None:
    for name in ("fit", "test"):
        page = (commands.root / name / "report.html").read_text()
        kind = "audio/wav" if commands.suffix == ".wav" else "image/webp"
        assert _embedded(page, kind)
        assert Image.open(commands.root / name / "samples.png").width > 100


def test_a_pipeline_of_embeddings_is_judged_by_their_error(tmp_path: Path) -> None:
    def embeddings(pipeline: DDPMPipeline, seeds: list[int]) -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipeline(batch_size=len(seeds), generator=generators, num_inference_steps=2, output_type="np").images
        return {"image_embeds": torch.from_numpy(images).flatten(1)}

    fpq.quantize(
        tiny_pipeline(), fpq.Recipe(rounding=fpq.RoundingRecipe(start="nearest")), tmp_path / "run",
        fpq.CalibrationDataModule(n_samples=8, n_search=4), embeddings,
        evaluation=fpq.EvaluationConfig(n_images=2), accelerator="cpu",
    )  # fmt: skip
    images = tmp_path / "run" / "images"
    (directory,) = images.glob("quantized-*")
    ratios = []
    for seed in range(2):
        found, expected = (np.load(d / f"{seed:06d}.npy").astype(float) for d in (directory, images / "full_precision"))
        ratios.append(10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum()))
    values = json.loads((tmp_path / "run" / "report.json").read_text())["variants"]["quantized"]
    assert values["snr_latents"] == pytest.approx(np.mean(ratios), rel=1e-4)
