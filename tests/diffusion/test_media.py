"""What a pipeline gives is told by its fields and shapes, and files hold it without loss."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.animatediff import AnimateDiffPipelineOutput
from diffusers.pipelines.kandinsky.pipeline_kandinsky_prior import KandinskyPriorPipelineOutput
from diffusers.pipelines.pipeline_utils import AudioPipelineOutput, ImagePipelineOutput
from models import tiny_pipeline
from PIL import Image
from scipy.io import wavfile
from torch import Tensor

from fpq_lightning.diffusion.images import ImageDirectory
from fpq_lightning.diffusion.media import LATENT, SOUND, VIDEO, medium_of
from fpq_lightning.diffusion.outputs import sampling_rate, tensor_of
from fpq_lightning.diffusion.sampling import FunctionSampler, sample

BYTES = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 8, 3), np.uint8)  # videos
UNIT = BYTES.astype(np.float32) / 255
CLIPS = torch.from_numpy(BYTES / 127.5 - 1).float().permute(0, 1, 4, 2, 3)
SOUNDS = np.random.default_rng(1).normal(size=(2, 2, 40)).astype(np.float32) / 3


def _pil(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels)


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-6)


# --- outputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "output",
    [
        AnimateDiffPipelineOutput(frames=UNIT),
        AnimateDiffPipelineOutput(frames=[[_pil(frame) for frame in video] for video in BYTES]),
        AnimateDiffPipelineOutput(frames=list(UNIT)),
        AnimateDiffPipelineOutput(frames=torch.from_numpy(UNIT).permute(0, 1, 4, 2, 3)),
        AnimateDiffPipelineOutput(frames=[[torch.from_numpy(f).permute(2, 0, 1) for f in video] for video in UNIT]),
        ImagePipelineOutput(images=[[_pil(frame) for frame in video] for video in BYTES]),
        SimpleNamespace(loss=None, frames=UNIT),
        (UNIT, None),
        UNIT,
        BYTES,
        CLIPS,
    ],
)
def test_a_video_is_one_whatever_holds_it(output: Any) -> None:
    assert _close(tensor_of(output, 2), CLIPS)


@pytest.mark.parametrize(
    "output",
    [
        ImagePipelineOutput(images=UNIT[:, 0]),
        ImagePipelineOutput(images=[_pil(video[0]) for video in BYTES]),
        ImagePipelineOutput(images=torch.from_numpy(UNIT[:, 0]).permute(0, 3, 1, 2)),
        ImagePipelineOutput(images=np.concatenate([UNIT[:, 0], np.zeros((2, 6, 8, 1), np.float32)], -1)),
        {"image": UNIT[:, 0], "depth": UNIT[:, 1]},
        [_pil(video[0]) for video in BYTES],
        CLIPS[:, 0],
    ],
)
def test_an_image_is_one_whatever_holds_it(output: Any) -> None:
    assert _close(tensor_of(output, 2), CLIPS[:, 0])


def test_gray_pixels_have_three_channels() -> None:
    assert torch.equal(tensor_of(UNIT[..., :1], 2), tensor_of(UNIT[..., [0, 0, 0]], 2))
    assert torch.equal(tensor_of(CLIPS[:, 0, :1], 2), CLIPS[:, 0, [0, 0, 0]])


@pytest.mark.parametrize(
    ("output", "shape"),
    [
        (AudioPipelineOutput(audios=SOUNDS), (2, 2, 40)),
        (AudioPipelineOutput(audios=SOUNDS[:, 0]), (2, 1, 40)),
        (AudioPipelineOutput(audios=torch.from_numpy(SOUNDS)), (2, 2, 40)),
        (AudioPipelineOutput(audios=list(SOUNDS[:, 0])), (2, 1, 40)),
        (SOUNDS, (2, 2, 40)),
        (SOUNDS[:, :1], (2, 1, 40)),
    ],
)
def test_sound_has_channels(output: Any, shape: tuple[int, ...]) -> None:
    found = tensor_of(output, 2)
    assert medium_of(found) is SOUND
    assert torch.equal(found, torch.from_numpy(SOUNDS[:, : shape[1]]))


def test_integers_of_sound_are_of_full_scale() -> None:
    samples = np.array([[[-32768, 0, 16384]]], np.int16)
    assert tensor_of(AudioPipelineOutput(audios=samples), 1).tolist() == [[[-1, 0, 0.5]]]


@pytest.mark.parametrize(
    ("output", "asked"),
    [
        (ImagePipelineOutput(images=torch.ones(2, 3, 8, 8)), True),
        (AnimateDiffPipelineOutput(frames=torch.ones(2, 16, 3, 4, 1)), True),
        (AudioPipelineOutput(audios=torch.ones(2, 12, 16)), True),
        (ImagePipelineOutput(images=torch.ones(2, 16, 12)), False),  # packed
        (ImagePipelineOutput(images=torch.ones(2, 12, 4, 4)), False),
        (KandinskyPriorPipelineOutput(torch.ones(2, 192), torch.zeros(2, 192)), False),
        (SimpleNamespace(image_embeddings=torch.ones(2, 3, 8, 8), prompt_embeds=torch.zeros(2, 1)), False),
        ({"prediction": np.ones((2, 8, 8, 3), np.float32)}, False),
    ],
)
def test_everything_else_is_latents(output: Any, asked: bool) -> None:
    found = tensor_of(output, 2, asked)
    assert medium_of(found) is LATENT
    assert torch.equal(found, torch.ones(2, 192))


def test_a_pipeline_that_knows_no_latents_gives_images_when_asked_for_them() -> None:
    assert _close(tensor_of(ImagePipelineOutput(images=UNIT[:, 0]), 2, as_latents=True), CLIPS[:, 0])


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (SimpleNamespace(text=["a", "b"]), "SimpleNamespace holds no images, video, sound or latents"),
        (SimpleNamespace(), "holds no images"),
        (ImagePipelineOutput(images=[]), "holds no images"),
        (UNIT[:1], "ndarray holds 1 outputs for 2 seeds"),
        (list(BYTES.reshape(10, 6, 8, 3)), "list holds 10 outputs for 2 seeds"),
        ([[_pil(BYTES[0, 0])], [_pil(f) for f in BYTES[1]]], "list holds outputs of several shapes"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(output: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        tensor_of(output, 2)
    assert "\n" not in str(error.value)


# --- sampling rates --------------------------------------------------------------------------------------------


def _rated(**configs: dict[str, Any]) -> Any:
    components = {name: SimpleNamespace(config=SimpleNamespace(**config)) for name, config in configs.items()}
    return SimpleNamespace(config=SimpleNamespace(), components={**components, "feature_extractor": object()})


@pytest.mark.parametrize(
    ("pipeline", "rate"),
    [
        (_rated(vae={"sampling_rate": 44100}), 44100),
        (_rated(text_encoder={"sampling_rate": 48000}, vae={}, vocoder={"sampling_rate": 16000}), 16000),
        (_rated(unet={"sample_rate": 8000}, scheduler={}), 8000),
        (_rated(unet={"sample_size": 8}), None),
    ],
)
def test_the_sampling_rate_is_that_of_what_makes_the_sound(pipeline: Any, rate: int | None) -> None:
    assert sampling_rate(pipeline) == rate


def test_sound_of_an_unknown_rate_is_refused_in_a_line() -> None:
    sampler = FunctionSampler(function=lambda pipeline, seeds: SOUNDS[: len(seeds)])
    with pytest.raises(ValueError, match="nothing in DDPMPipeline tells the sampling rate") as error:
        sample(tiny_pipeline(), sampler, [0, 1])
    assert "\n" not in str(error.value)
    pipeline = tiny_pipeline()
    pipeline.sampling_rate = 4000
    assert torch.equal(sample(pipeline, sampler, [0, 1]), torch.from_numpy(SOUNDS))


# --- files -----------------------------------------------------------------------------------------------------


def _frames(file: Path) -> list[tuple[np.ndarray, float]]:
    """Frames and milliseconds of an animated picture, by Pillow alone."""
    with Image.open(file) as image:
        found = []
        for i in range(image.n_frames):
            image.seek(i)
            found.append((np.asarray(image.convert("RGB")), image.info["duration"]))
        return found


def test_an_animated_picture_holds_a_video_without_loss(tmp_path: Path) -> None:
    VIDEO.save(CLIPS[0], tmp_path / "a.webp", None)
    frames = _frames(tmp_path / "a.webp")
    assert np.array_equal(np.stack([frame for frame, _ in frames]), BYTES[0])
    assert {milliseconds for _, milliseconds in frames} == {125}
    assert torch.equal(VIDEO.load(tmp_path / "a.webp"), VIDEO.rounded(CLIPS[0]))


@pytest.mark.parametrize("order", [[0], [0, 0], [0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0]])
def test_frames_that_repeat_are_all_there_again(tmp_path: Path, order: list[int]) -> None:
    VIDEO.save(CLIPS[0, order], tmp_path / "a.webp", None)
    assert torch.equal(VIDEO.load(tmp_path / "a.webp"), VIDEO.rounded(CLIPS[0, order]))


def test_a_wav_file_holds_a_sound_in_sixteen_bits_cut_off_at_full_scale(tmp_path: Path) -> None:
    loud = torch.from_numpy(SOUNDS[0]) * 2
    assert loud.abs().max() > 1
    SOUND.save(loud, tmp_path / "a.wav", 22050)
    rate, found = wavfile.read(tmp_path / "a.wav")
    assert (rate, found.dtype) == (22050, np.int16)
    assert np.array_equal(found, np.clip(np.rint(loud.double().numpy().T * 32768), -32768, 32767))
    again = SOUND.load(tmp_path / "a.wav")
    assert np.array_equal(again.numpy(), found.T / np.float32(32768))
    assert torch.equal(again, SOUND.rounded(loud))


def test_latents_are_numpy_files_of_all_their_bits(tmp_path: Path) -> None:
    latent = torch.randn(7) * 1e6
    LATENT.save(latent, tmp_path / "a.npy", None)
    assert np.array_equal(np.load(tmp_path / "a.npy"), latent.numpy())
    assert torch.equal(LATENT.load(tmp_path / "a.npy"), latent)


OF_EACH_KIND = [
    (VIDEO.rounded(CLIPS), ".webp"),
    (SOUND.rounded(torch.from_numpy(SOUNDS)), ".wav"),
    (torch.randn(2, 9), ".npy"),
]


@pytest.mark.parametrize(("made", "suffix"), OF_EACH_KIND)
def test_a_flipped_bit_in_a_kept_file_of_each_kind_is_found_and_one_of_an_older_version_is_read(
    tmp_path: Path, made: Tensor, suffix: str
) -> None:
    def complete() -> Tensor:
        return ImageDirectory(tmp_path, {"weights": "a"}).complete([0], lambda seeds: made[seeds], 8000)

    complete()
    file = tmp_path / f"000000{suffix}"
    contents = file.read_bytes()
    older = contents[: contents.rindex(b"\nblake2b:")]
    for damaged in (
        contents[:-90] + bytes([contents[-90] ^ 1]) + contents[-89:],
        contents[:-9] + bytes(9),
        older + b"\0",
    ):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"000000\{suffix} cannot be read .*: delete it"):
            complete()
    file.write_bytes(older)
    assert torch.equal(complete(), made[:1])


@pytest.mark.parametrize(("made", "suffix"), OF_EACH_KIND)
def test_a_directory_keeps_each_kind_and_names_a_damaged_file(tmp_path: Path, made: Tensor, suffix: str) -> None:
    asked: list[list[int]] = []

    def make(seeds: list[int]) -> Tensor:
        asked.append(seeds)
        return made[seeds]

    directory = ImageDirectory(tmp_path, {"weights": "a"})
    assert torch.equal(directory.complete([1], make, 8000), made[[1]])
    assert torch.equal(directory.complete([0, 1], make, 8000), made)
    assert torch.equal(directory.complete([0, 1], make, 8000), made)
    assert asked == [[1], [0]]
    assert {f.name for f in tmp_path.iterdir()} == {f"000000{suffix}", f"000001{suffix}", "settings.json"}
    file = tmp_path / f"000001{suffix}"
    file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(ValueError, match=rf"000001\{suffix} cannot be read .*: delete it"):
        directory.complete([1], make, 8000)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"without settings\.json"):
        ImageDirectory(tmp_path, {"weights": "a"})
