"""The kinds of what pipelines give, told apart by a tensor's number of axes, and the files that hold them.

| kind | tensor of n of them | values | file |
| --- | --- | --- | --- |
| video | `[n, frames, 3, height, width]` | [-1, 1] | animated WebP, lossless |
| image | `[n, 3, height, width]` | [-1, 1] | PNG |
| sound | `[n, channels, samples]` | [-1, 1] | WAV in 16 bits |
| latent | `[n, values]` | any | NumPy |
"""

from __future__ import annotations

import io
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from PIL.ExifTags import Base
from torch import Tensor

from fpq_lightning.utils.files import atomic_write

FRAME_MILLISECONDS = 125  # of videos in files: pipelines do not say how fast their frames follow each other


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images.float().div(127.5).sub(1)


def to_samples(sounds: Tensor) -> Tensor:
    """Sounds in [-1, 1] as int16."""
    return sounds.clamp(-1, 1).mul(2**15).round().clamp(max=2**15 - 1).to(torch.int16)


def from_samples(sounds: Tensor) -> Tensor:
    """int16 sounds as float32 in [-1, 1]."""
    return sounds.float().div(2**15)


def save_png(image: Tensor, file: Path) -> None:
    """Writes an image `[channels, height, width]` in [-1, 1] atomically."""
    with atomic_write(file) as temporary:
        Image.fromarray(to_bytes(image).permute(1, 2, 0).squeeze(-1).numpy()).save(temporary, compress_level=1)


def load_png(file: Path) -> Tensor:
    """Reads an image that `save_png` wrote: `[channels, height, width]`, float32 in [-1, 1]."""
    with Image.open(file) as image:
        pixels = torch.from_numpy(np.array(image))
    return from_bytes(pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1))


def webp(video: Tensor, lossless: bool = True) -> bytes:
    """A video `[frames, 3, height, width]` in [-1, 1] as an animated WebP that repeats itself."""
    frames = [Image.fromarray(frame) for frame in to_bytes(video).permute(0, 2, 3, 1).numpy()]
    options = {"lossless": True, "quality": 0, "method": 0} if lossless else {"quality": 80}
    exif = Image.Exif()
    exif[Base.ImageDescription] = f"{len(frames)} frames"
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=FRAME_MILLISECONDS,
        loop=0,
        exif=exif,
        **options,
    )
    return buffer.getvalue()


def _load_video(file: Path) -> Tensor:
    frames: list[Tensor] = []
    with Image.open(file) as image:
        count = int(image.getexif()[Base.ImageDescription].split()[0])
        for frame in ImageSequence.Iterator(image):
            pixels = torch.from_numpy(np.array(frame.convert("RGB"))).permute(2, 0, 1)
            # Equal frames in a row are one frame in the file, which is shown for longer.
            frames += [from_bytes(pixels)] * max(1, round(frame.info.get("duration", 0) / FRAME_MILLISECONDS))
    return torch.stack(frames + frames[-1:] * (count - len(frames)))  # where nothing moves there is no duration


def wav(sound: Tensor, sampling_rate: int) -> bytes:
    """A sound `[channels, samples]` in [-1, 1] as a WAV file in 16 bits."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as out:
        out.setnchannels(len(sound))
        out.setsampwidth(2)
        out.setframerate(sampling_rate)
        out.writeframes(to_samples(sound).T.numpy().astype("<i2").tobytes())
    return buffer.getvalue()


def _load_sound(file: Path) -> Tensor:
    with wave.open(str(file), "rb") as opened:
        channels, count = opened.getnchannels(), opened.getnframes()
        samples = np.frombuffer(opened.readframes(count), "<i2")
    return from_samples(torch.from_numpy(samples.astype(np.int16).reshape(count, channels).T.copy()))


@dataclass(frozen=True)
class Medium:
    """A kind of what pipelines give.

    Attributes:
        name: one of them.
        suffix: of a file that holds one.
        rounded: values as the file holds them, which is how people get them, and how they are judged.
        save: writes one atomically, given its file and, for a sound, the sampling rate.
        load: reads one.
        length: bytes that the contents of a file should be, by what they say themselves.
    """

    name: str
    suffix: str
    rounded: Callable[[Tensor], Tensor]
    save: Callable[[Tensor, Path, int | None], None]
    load: Callable[[Path], Tensor]
    length: Callable[[bytes], int]

    @property
    def plural(self) -> str:
        """Several of them."""
        return f"{self.name}s"


def _save_video(video: Tensor, file: Path, sampling_rate: int | None) -> None:
    with atomic_write(file) as temporary:
        temporary.write_bytes(webp(video))


def _save_image(image: Tensor, file: Path, sampling_rate: int | None) -> None:
    save_png(image, file)


def _save_sound(sound: Tensor, file: Path, sampling_rate: int | None) -> None:
    if sampling_rate is None:
        raise ValueError(f"{file}: a sound needs a sampling rate")
    with atomic_write(file) as temporary:
        temporary.write_bytes(wav(sound, sampling_rate))


def _save_latent(latent: Tensor, file: Path, sampling_rate: int | None) -> None:
    with atomic_write(file) as temporary:
        np.save(temporary, latent.numpy())


def _in_eight_bits(pixels: Tensor) -> Tensor:
    return from_bytes(to_bytes(pixels))


def _in_sixteen_bits(sounds: Tensor) -> Tensor:
    return from_samples(to_samples(sounds))


def _load_latent(file: Path) -> Tensor:
    return torch.from_numpy(np.load(file))


def _length_of_riff(contents: bytes) -> int:
    return 8 + int.from_bytes(contents[4:8], "little")


def _length_of_png(contents: bytes) -> int:
    return contents.rfind(b"IEND") + 8


def _length_of_latent(contents: bytes) -> int:
    values = io.BytesIO(contents)
    np.load(values)
    return values.tell()


VIDEO = Medium("video", ".webp", _in_eight_bits, _save_video, _load_video, _length_of_riff)
IMAGE = Medium("image", ".png", _in_eight_bits, _save_image, load_png, _length_of_png)
SOUND = Medium("sound", ".wav", _in_sixteen_bits, _save_sound, _load_sound, _length_of_riff)
LATENT = Medium("latent", ".npy", lambda latents: latents, _save_latent, _load_latent, _length_of_latent)
MEDIA = {5: VIDEO, 4: IMAGE, 3: SOUND, 2: LATENT}  # by the number of axes of a tensor of several


def medium_of(outputs: Tensor) -> Medium:
    """The kind of what a tensor holds several of."""
    return MEDIA[outputs.ndim]
