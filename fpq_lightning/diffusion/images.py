"""Images: datasets of real images, and directories of sampled images as PNG files by seed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fpq_lightning.diffusion.dataset_files import open_dataset
from fpq_lightning.utils.files import atomic_write, differences, shorten, write_json

if TYPE_CHECKING:
    import datasets

_SETTINGS = "settings.json"


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images.float().div(127.5).sub(1)


def save_png(image: Tensor, file: Path) -> None:
    """Writes an image `[channels, height, width]` in [-1, 1] atomically."""
    with atomic_write(file) as temporary:
        Image.fromarray(to_bytes(image).permute(1, 2, 0).squeeze(-1).numpy()).save(temporary, compress_level=1)


def load_png(file: Path) -> Tensor:
    """Reads an image that `save_png` wrote: `[channels, height, width]`, float32 in [-1, 1].

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        with Image.open(file) as image:
            pixels = torch.from_numpy(np.array(image))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"the image {file} cannot be read ({error}): delete it") from error
    return from_bytes(pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1))


class ImageDirectory:
    """Sampled images of one model and sampler. The image of seed i is ``<i>.png``, and is sampled only once.

    Args:
        path: the directory, which is made when the first image is written.
        settings: everything that decides the images, plain types.

    Raises:
        ValueError: if the directory holds images made with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        file = path / _SETTINGS
        if file.is_file():
            if changed := differences(json.loads(file.read_text()), self.settings):
                raise ValueError(
                    f"the images in {path} were made with other settings ({shorten(changed)}): delete them or choose "
                    "another directory"
                )
        elif path.is_dir() and any(path.glob("*.png")):
            raise ValueError(
                f"{path} holds images without {_SETTINGS}, which says how they were made: choose another directory"
            )

    def file(self, seed: int) -> Path:
        """The file of a seed's image."""
        return self.path / f"{seed:06d}.png"

    def complete(self, seeds: Sequence[int], make: Callable[[list[int]], Tensor]) -> Tensor:
        """Images of seeds, `[n, channels, height, width]` in [-1, 1].

        Args:
            seeds: seeds of the images.
            make: samples the images that are missing, given their seeds.
        """
        found = {seed: load_png(self.file(seed)) for seed in seeds if self.file(seed).is_file()}
        if missing := [seed for seed in seeds if seed not in found]:
            if not (self.path / _SETTINGS).is_file():
                write_json(self.path / _SETTINGS, self.settings)
            for seed, image in zip(missing, make(missing), strict=True):
                found[seed] = image
                if image.isfinite().all():
                    save_png(image, self.file(seed))
        return torch.stack([found[seed] for seed in seeds])


def load_images(source: str, column: str) -> datasets.Dataset:
    """Opens a dataset of images: a parquet file, or the name or directory of a `datasets` dataset.

    Raises:
        ValueError: if it is empty or lacks the column.
        FileNotFoundError: if it is not there.
    """
    dataset = open_dataset(source, f"there is no dataset of images {source}")
    if column not in dataset.column_names:
        raise ValueError(f"{source} has no column {column!r}; it has {', '.join(dataset.column_names)}")
    if not len(dataset):
        raise ValueError(f"{source} holds no images")
    return dataset


def image_tensor(image: Any, height: int, width: int) -> Tensor:
    """A PIL image as `[3, height, width]`, float32 in [-1, 1]."""
    resized = image.convert("RGB")
    if resized.size != (width, height):
        resized = resized.resize((width, height))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div_(127.5).sub_(1)


def read_images(
    dataset: datasets.Dataset, column: str, rows: Sequence[int], batch_size: int, corrupt: str = "fail"
) -> Iterator[Tensor]:
    """Images of a dataset in their own size, `[n, 3, height, width]` in [-1, 1]; a batch holds images of one size.

    Args:
        dataset: from `load_images`.
        column: column of the images.
        rows: which images.
        batch_size: the most images in a batch.
        corrupt: what to do with an image that cannot be read: ``fail``, or ``skip`` it and warn.

    Raises:
        ValueError: if an image cannot be read and `corrupt` is ``fail``.
    """
    batch: list[Tensor] = []
    skipped: list[int] = []
    for row in rows:
        try:
            image = dataset[row][column].convert("RGB")
        except (OSError, UnidentifiedImageError, AttributeError, SyntaxError) as error:
            if corrupt == "fail":
                raise ValueError(
                    f"image {row} of the real ones cannot be read ({' '.join(str(error).split())[:100]}): repair it "
                    "or pass --evaluation.corrupt skip"
                ) from error
            skipped.append(row)
            continue
        found = from_bytes(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        if batch and (len(batch) == batch_size or batch[0].shape != found.shape):
            yield torch.stack(batch)
            batch = []
        batch.append(found)
    if batch:
        yield torch.stack(batch)
    if skipped:
        named = ", ".join(map(str, skipped[:5])) + (", ..." if len(skipped) > 5 else "")
        warnings.warn(f"{len(skipped)} real images cannot be read and were skipped: {named}", stacklevel=2)
