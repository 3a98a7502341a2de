"""Headers of safetensors files, read and checked without their tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fpq_lightning.utils.reading import check_file

STORED_TYPES = {
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bool: "BOOL",
    torch.int32: "I32",
    torch.int64: "I64",
}
"""What safetensors calls types of tensors."""

FLOATS = ("F16", "BF16", "F32", "F64")
"""Of these, the types of tensors that are not packed."""

_LONGEST = 100_000_000  # bytes of a header, the limit of safetensors
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class StoredTensor:
    """Type (as safetensors names it) and shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> StoredTensor:
        """How files hold a tensor."""
        return cls(STORED_TYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))

    def may_be(self, wanted: StoredTensor) -> bool:
        """Whether a plain tensor of a model can be read from this: a number for each of its numbers."""
        return self.shape == wanted.shape and (self.dtype in FLOATS) == (wanted.dtype in FLOATS)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def check_names(expected: Collection[str], found: Collection[str]) -> None:
    """Compares the names of the tensors in files with those of a model.

    Raises:
        ValueError: if one is missing or too much.
    """
    if missing := sorted({*expected} - {*found}):
        raise ValueError(f"the files lack {missing[0]}" + f" and {len(missing) - 1} more" * (len(missing) > 1))
    if extra := sorted({*found} - {*expected}):
        more = f" and {len(extra) - 1} more" * (len(extra) > 1)
        raise ValueError(f"the files hold {extra[0]}{more}, which the model does not know of")


def check_plain(model: nn.Module, directory: Path, exact: bool = False) -> None:
    """Compares an opened model without packed layers with its files.

    Args:
        model: in float32.
        directory: of the files.
        exact: whether half precision in them is wrong.

    Raises:
        ValueError: if a tensor is missing, too much, or of another kind or shape.
    """
    found = {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in read_header(file).items()}
    expected = {name: StoredTensor.of(tensor) for name, tensor in model.state_dict().items()}
    check_names(expected, found)
    for name, wanted in expected.items():
        if not (found[name] == wanted if exact else found[name].may_be(wanted)):
            raise ValueError(f"{name} is {found[name]} in the files, but should be {wanted}")


def read_header(file: str | Path) -> dict[str, StoredTensor]:
    """Reads the types and shapes of the tensors in a safetensors file, by name.

    Raises:
        ValueError: if it is not a safetensors file, or a tensor takes other bytes than its shape needs.
    """
    check_file(Path(file))
    size = Path(file).stat().st_size
    with Path(file).open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 2 <= length <= min(_LONGEST, size - 8):
            raise ValueError(f"{file} is damaged or no safetensors file: its header cannot be {length} bytes long")
        text = handle.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        found = {name: StoredTensor(e["dtype"], tuple(e["shape"])) for name, e in entries.items()}
        places = {name: (int(e["data_offsets"][0]), int(e["data_offsets"][1])) for name, e in entries.items()}
        sizes = {name: math.prod(t.shape) * _BYTES[t.dtype] for name, t in found.items() if t.dtype in _BYTES}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: its header cannot be read ({type(error).__name__}: {error})") from error
    for name, (begin, end) in places.items():
        if begin < 0 or sizes.get(name, end - begin) != end - begin:
            raise ValueError(f"{file} is damaged: {name} is {found[name]}, but takes {end - begin} bytes")
        if 8 + length + end > size:
            raise ValueError(f"{file} is truncated: {name} ends at byte {8 + length + end}, the file at {size}")
    return found
