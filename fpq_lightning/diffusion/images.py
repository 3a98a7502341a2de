"""Images: datasets of real images, and directories of sampled images, videos or sounds as files by seed."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from fpq_lightning.diffusion.dataset_files import open_dataset
from fpq_lightning.diffusion.media import MEDIA, from_bytes, load_png, medium_of, save_png, to_bytes
from fpq_lightning.utils.digests import check_seal, seal
from fpq_lightning.utils.files import differences, shorten, write_json
from fpq_lightning.utils.reading import check_file, read_json
from fpq_lightning.utils.temporary import remove_leftovers

if TYPE_CHECKING:
    import datasets

__all__ = [
    "ImageDirectory",
    "from_bytes",
    "image_tensor",
    "load_images",
    "load_png",
    "read_images",
    "save_png",
    "to_bytes",
]

_SETTINGS = "settings.json"


class ImageDirectory:
    """Sampled images (or videos, sounds, latents) of one model and sampler, each sampled only once.

    That of seed i is ``<i>.png``; videos are ``.webp``, sounds ``.wav`` and latents ``.npy``.

    Args:
        path: the directory, which is made when the first image is written.
        settings: everything that decides the images, plain types.

    Raises:
        ValueError: if the directory holds images made with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self._shape: torch.Size | None = None  # of each of them
        remove_leftovers(path)
        file = path / _SETTINGS
        if os.path.lexists(file):
            if changed := differences(read_json(file), self.settings):
                raise ValueError(
                    f"the images in {path} were made with other settings ({shorten(changed)}): delete them or choose "
                    "another directory"
                )
        elif path.is_dir() and any(any(path.glob(f"*{medium.suffix}")) for medium in MEDIA.values()):
            raise ValueError(
                f"{path} holds images without {_SETTINGS}, which says how they were made: choose another directory"
            )

    def file(self, seed: int) -> Path | None:
        """The file of a seed's image; None if there is none."""
        files = (self.path / f"{seed:06d}{medium.suffix}" for medium in MEDIA.values())
        return next((file for file in files if os.path.lexists(file)), None)

    def complete(
        self, seeds: Sequence[int], make: Callable[[list[int]], Tensor], sampling_rate: int | None = None
    ) -> Tensor:
        """Images of seeds, rounded as their files are.

        Args:
            seeds: seeds of the images.
            make: samples the images that are missing, given their seeds.
            sampling_rate: of sounds.

        Raises:
            ValueError: if a file is damaged, or holds an image of another size than the others.
        """
        found = {seed: _load(file) for seed in seeds if (file := self.file(seed)) is not None}
        kept = set(found)
        if missing := [seed for seed in seeds if seed not in found]:
            if not (self.path / _SETTINGS).is_file():
                write_json(self.path / _SETTINGS, self.settings)
            made = make(missing)
            medium = medium_of(made)
            for seed, image in zip(missing, made, strict=True):
                found[seed] = image
                if image.isfinite().all():
                    file = self.path / f"{seed:06d}{medium.suffix}"
                    medium.save(image, file, sampling_rate)
                    seal(file)
            self._shape = made[0].shape
        self._shape = self._shape or Counter(image.shape for image in found.values()).most_common(1)[0][0]
        for seed in sorted(kept):
            if found[seed].shape != self._shape:
                sizes = " and ".join(str(list(shape)) for shape in (found[seed].shape, self._shape))
                raise ValueError(f"{self.file(seed)} is of another size than others ({sizes}): delete it")
        return torch.stack([found[seed] for seed in seeds])


def _load(file: Path) -> Tensor:
    medium = next(medium for medium in MEDIA.values() if medium.suffix == file.suffix)
    try:
        check_file(file)
        is_sealed = check_seal(file)
        found = medium.load(file)
        if not is_sealed and file.stat().st_size != medium.length(file.read_bytes()):
            raise ValueError("it does not end where it should")
        return found
    except Exception as error:  # a damaged file may raise anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the {medium.name} {file} cannot be read ({reason}): delete it") from error


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
