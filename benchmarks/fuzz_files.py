"""Damaged files of every kind that is read: are they refused in one line, gone round, or read as they were?

    python benchmarks/fuzz_files.py --mutations 2000

Files of each kind are written once. Each mutation changes a file of a copy, and the copy is read in a process that is
watched: it may not crash, hang or run code, and never gives other values without a word. The table counts how the
mutations of each kind ended. Needs the checkout; a hundred mutations take some seconds on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import select
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from models import tiny_pipeline

import fpq_lightning as fpq
from fpq_lightning.calibration.disk import load_calibration_set
from fpq_lightning.diffusion.images import ImageDirectory
from fpq_lightning.nn.packed_layer import packed_layers
from fpq_lightning.storage.export import export
from fpq_lightning.study.table import markdown_table, read_rows
from fpq_lightning.training.run_directory import RunDirectory
from fpq_lightning.training.unit_files import UnitFiles
from fpq_lightning.utils import digests
from fpq_lightning.utils.digests import digest_of_tree, read_json_with_digest, with_digest
from fpq_lightning.utils.files import write_json

RIGHT = ("refused", "recovered", "harmless")
LONGEST = 60  # seconds that a mutation may take
_HEAD = 256  # bytes, as of files that are longer than `digests.HEAD`

Random = random.Random

# --- kinds of files ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Files that are read together.

    Attributes:
        name: of the kind.
        directory: that holds them, whole.
        files: pattern of those that are damaged.
        read: reads the files of a copy; what it gives is compared.
        recovered: what it may give instead, if a damaged file is gone round.
    """

    name: str
    directory: Path
    files: str
    read: Callable[[Path], str]
    recovered: str | None = None


def make_kinds(root: Path) -> list[Kind]:
    """Writes files of every kind."""
    run, data = root / "run", fpq.CalibrationDataModule(n_samples=8, n_search=4, micro_batch=8)
    recipe = fpq.Recipe(
        attention=fpq.AttentionRecipe("fp8"),
        rounding=fpq.RoundingRecipe(start="nearest", learned=True, iterations=2, batch_size=2),
        include=["conv_in", "mid_block.*"],
    )
    sampler, options = fpq.SamplerConfig(steps=3, batch_size=4), {"accelerator": "cpu", "logger": False}
    options["enable_progress_bar"] = False
    fpq.quantize(tiny_pipeline(), recipe, run, data, sampler, **options)
    export(run / "quantized", root / "dequantized", "dequantized")
    shutil.copytree(run / "quantized", root / "verified")
    with patch.object(digests, "HEAD", _HEAD):
        digests.write_digests(root / "verified")
    parts = json.loads((run / "fingerprint.json").read_text())["parts"]
    checkpoints = root / "checkpoints"
    shutil.copytree(run / "checkpoints", checkpoints / "checkpoints")
    shutil.copy(run / "fingerprint.json", checkpoints)

    previous = _checkpoint(run / "checkpoints" / "previous.ckpt")

    def newest(directory: Path) -> str:
        file = RunDirectory(directory, parts).newest_checkpoint()
        return "none" if file is None else _checkpoint(file)

    kinds = [
        Kind("calibration set", run / "calibration", "*", _calibration_set),
        Kind("packed pipeline", run / "quantized", "**/*", lambda path: _pipeline(path, False)),
        Kind("packed pipeline, verified", root / "verified", "**/*", lambda path: _pipeline(path, True)),
        Kind("dequantized pipeline", root / "dequantized", "**/*", lambda path: _pipeline(path, False)),
        Kind("checkpoint", checkpoints, "checkpoints/*.ckpt", newest, previous),
        Kind("finished unit", checkpoints, "checkpoints/units/*", newest, previous),
        Kind("fingerprint", checkpoints, "*.json", lambda path: RunDirectory(path, parts).state().value),
    ]
    (root / "report").mkdir()
    shutil.copy(run / "report.json", root / "report")
    kinds.append(Kind("report", root / "report", "*", lambda path: repr(read_json_with_digest(path / "report.json"))))
    rows = {}
    for name in ("a", "b", "c"):
        row = {"name": name, "variant": "quantized", "group": "recipes", "hardware": "cpu", "date": "2026-11-28"}
        row |= {"versions": {"torch": "2.11"}, "metrics": {"n_images": 4, "fd": random.Random(name).random()}}
        row |= {"trajectory": {"timesteps": [2.0, 1.0], "output": [0.5, 0.25], "state": [0.0, 0.1]}, "settings": {}}
        rows[f"rows/{name}.quantized.json"] = with_digest(row)

    def table_of(directory: Path) -> str:
        for file in (directory / name for name in rows):
            if not os.path.lexists(file):  # it is computed
                write_json(file, rows[str(file.relative_to(directory))])
        return markdown_table(read_rows(directory))

    table_of(root / "study")
    kinds.append(Kind("study row", root / "study", "rows/*", table_of))
    media = {"images": (3, 8, 8), "videos": (2, 3, 16, 16), "sounds": (1, 200), "latents": (12,)}
    for name, shape in media.items():
        _images(root / name, shape)
        kinds.append(Kind(name, root / name, "*", lambda path, shape=shape: _images(path, shape)))
    return kinds


def _calibration_set(directory: Path) -> str:
    found = load_calibration_set(directory)
    return digest_of_tree([found.inputs, found.weights, found.constants, found.structure, found.group_of])


def _pipeline(directory: Path, verify: bool) -> str:
    with patch.object(digests, "HEAD", _HEAD if verify else digests.HEAD):
        pipeline = fpq.load_quantized(directory, verify=verify)
    unet = pipeline.unet
    layers = {name: layer.describe() for name, layer in packed_layers(unet).items()}
    with torch.no_grad():
        output = unet(torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8), 500).sample
    state = {name: tensor.view(torch.uint8) if tensor.ndim else tensor for name, tensor in unet.state_dict().items()}
    return digest_of_tree([state, layers, output, dict(pipeline.scheduler.config)])


def _checkpoint(file: Path) -> str:
    checkpoint = torch.load(file, weights_only=True)
    digests = checkpoint["finished_units"]
    units = [UnitFiles.beside(file).read(number, digests) for number in range(len(digests))]
    return digest_of_tree([checkpoint, units])


def _images(directory: Path, shape: tuple[int, ...]) -> str:
    def make(seeds: list[int]) -> Tensor:
        noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return (torch.stack(noises) * 32).round().clamp(-127, 127) / 128  # are what sounds hold

    found = ImageDirectory(directory, {"weights": "abc", "sampler": {"steps": 4}}).complete(range(3), make, 8000)
    kept = ImageDirectory(directory, {"weights": "abc", "sampler": {"steps": 4}}).complete(range(3), make, 8000)
    return digest_of_tree(kept) if found.shape == kept.shape else "other sizes"


# --- mutations -----------------------------------------------------------------------------------------------------


def _flip(file: Path, draw: Random) -> None:
    contents = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 4))):
        contents[draw.randrange(len(contents))] ^= 1 << draw.randrange(8)
    file.write_bytes(contents)


def _truncate(file: Path, draw: Random) -> None:
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])


def _zero(file: Path, draw: Random) -> None:
    contents = bytearray(file.read_bytes())
    start, length = draw.randrange(len(contents)), draw.choice((16, 512, 4096))
    contents[start : start + length] = bytes(len(contents[start : start + length]))
    file.write_bytes(contents)


def _append(file: Path, draw: Random) -> None:
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.choice((1, 100, 5000))))


def _remove(file: Path, draw: Random) -> None:
    file.unlink()


def _swap(file: Path, draw: Random) -> None:
    others = [other for other in file.parent.rglob(f"*{file.suffix}") if other.is_file() and other != file]
    if not others:
        raise NotApplicableError
    other = draw.choice(sorted(others))
    contents, others_contents = file.read_bytes(), other.read_bytes()
    file.write_bytes(others_contents), other.write_bytes(contents)


class NotApplicableError(Exception):
    """A mutation does not go with a file."""


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value, with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _json(change: Callable[[Any, Any, Random], None]) -> Callable[[Path, Random], None]:
    def mutate(file: Path, draw: Random) -> None:
        if file.suffix != ".json":
            raise NotApplicableError
        value = json.loads(file.read_text())
        change(*draw.choice(list(_places(value))), draw)
        file.write_text(json.dumps(value))

    return mutate


def _remove_key(container: Any, key: Any, draw: Random) -> None:
    del container[key]


def _rename_key(container: Any, key: Any, draw: Random) -> None:
    if isinstance(container, dict):
        container[f"{key}_"] = container.pop(key)
    else:
        container.insert(key, container[key])


def _other_type(container: Any, key: Any, draw: Random) -> None:
    container[key] = draw.choice([None, True, "text", 7, -1.5, [], {}, [[1]], {"a": {}}])


def _huge(container: Any, key: Any, draw: Random) -> None:
    container[key] = draw.choice([10**6, 2**31, 2**62, 10**30, -(2**40), 1e300, float("nan"), float("inf")])


def _header(change: Callable[[dict[str, Any], Random], None]) -> Callable[[Path, Random], None]:
    def mutate(file: Path, draw: Random) -> None:
        if file.suffix != ".safetensors":
            raise NotApplicableError
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        if not header.keys() - {"__metadata__"}:
            raise NotApplicableError
        change(header, draw)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return mutate


def _tensor(header: dict[str, Any], draw: Random) -> str:
    return draw.choice(sorted(header.keys() - {"__metadata__"}))


def _other_dtype(header: dict[str, Any], draw: Random) -> None:
    header[_tensor(header, draw)]["dtype"] = draw.choice(["F32", "F16", "BF16", "I32", "U8", "F8_E4M3", "BOOL", "X"])


def _other_shape(header: dict[str, Any], draw: Random) -> None:
    entry = header[_tensor(header, draw)]
    shape = entry["shape"]
    entry["shape"] = draw.choice([shape[::-1], [*shape, 1], [2**40, *shape], [-1], [0], "x"])


def _swap_tensors(header: dict[str, Any], draw: Random) -> None:
    a, b = _tensor(header, draw), _tensor(header, draw)
    header[a], header[b] = header[b], header[a]


def _rename_tensor(header: dict[str, Any], draw: Random) -> None:
    name = _tensor(header, draw)
    header[f"{name}_"] = header.pop(name)


def _drop_tensor(header: dict[str, Any], draw: Random) -> None:
    del header[_tensor(header, draw)]


def _pipe(file: Path, draw: Random) -> None:
    file.unlink()
    os.mkfifo(file)


def _directory(file: Path, draw: Random) -> None:
    file.unlink()
    file.mkdir()


def _link_out(file: Path, draw: Random) -> None:
    """A link to another file of its kind, outside."""
    outside = Path(tempfile.mkdtemp()) / file.name
    shutil.move(file, outside)
    _flip(outside, draw)
    file.symlink_to(outside)


def _link_to(target: str) -> Callable[[Path, Random], None]:
    def mutate(file: Path, draw: Random) -> None:
        file.unlink()
        file.symlink_to(target)

    return mutate


class _Code:
    """Runs code where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


_MARKER = Path(tempfile.gettempdir()) / f"fuzz-{os.getpid()}-ran"


def _pickle(file: Path, draw: Random) -> None:
    if draw.random() < 0.5:
        torch.save({"state_dict": _Code(_MARKER), "fpq": {}}, file)
    else:
        file.write_bytes(pickle.dumps(_Code(_MARKER)))


MUTATIONS: dict[str, Callable[[Path, Random], None]] = {
    "flipped bits": _flip,
    "truncated": _truncate,
    "zeroed block": _zero,
    "appended bytes": _append,
    "removed": _remove,
    "emptied": lambda file, draw: file.write_bytes(b"") and None,
    "swapped files": _swap,
    "removed key": _json(_remove_key),
    "renamed key": _json(_rename_key),
    "wrong type": _json(_other_type),
    "huge number": _json(_huge),
    "other dtype": _header(_other_dtype),
    "other shape": _header(_other_shape),
    "swapped tensors": _header(_swap_tensors),
    "renamed tensor": _header(_rename_tensor),
    "dropped tensor": _header(_drop_tensor),
    "pickle": _pickle,
    "pipe": _pipe,
    "directory": _directory,
    "link that leads out": _link_out,
    "link to a device": _link_to("/dev/zero"),
    "link to nothing": _link_to("nowhere"),
}


def mutate(kind: Kind, copy: Path, draw: Random) -> str:
    """Damages one file of a copy, and says how."""
    file = draw.choice(sorted(f for f in copy.glob(kind.files) if f.is_file()))
    names = list(MUTATIONS)
    draw.shuffle(names)
    for name in names:
        try:
            MUTATIONS[name](file, draw)
        except NotApplicableError:
            continue
        return f"{name}: {file.relative_to(copy)}"
    raise AssertionError(kind.name)


# --- reading -------------------------------------------------------------------------------------------------------


def outcome_of(kind: Kind, copy: Path, expected: str) -> str:
    """How reading a damaged copy ends."""
    found, text = None, ""
    try:
        found = kind.read(copy)
    except (ValueError, OSError) as error:
        text = str(error).strip()
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"
    if _MARKER.exists():
        return "WRONG: ran code"
    if found is None:
        return "refused" if len(text.splitlines()) == 1 else f"WRONG: not in one line: {text}"
    return "harmless" if found == expected else "recovered" if found == kind.recovered else "WRONG: other values"


def _work(kinds: list[Kind], expected: dict[str, str], numbers: range, seed: int, root: Path, pipe: int) -> None:
    """Does mutations, and writes a line for the beginning and the end of each."""
    warnings.simplefilter("ignore")
    tempfile.tempdir = str(root)
    for number in numbers:
        draw = Random(f"{seed} {number}")
        kind = kinds[number % len(kinds)]
        copy = root / f"copy-{number}"
        os.write(pipe, f"{json.dumps([number, kind.name, 'damaging it', None])}\n".encode())
        shutil.copytree(kind.directory, copy)
        how = mutate(kind, copy, draw)
        os.write(pipe, f"{json.dumps([number, kind.name, how, None])}\n".encode())
        ended = outcome_of(kind, copy, expected[kind.name])
        os.write(pipe, f"{json.dumps([number, kind.name, how, ended[:1000]])}\n".encode())
        shutil.rmtree(copy)


def _lines(pipe: int) -> Iterator[str | None]:
    """Lines of a pipe until its end; None where there is none for too long."""
    left = b""
    while True:
        if not select.select([pipe], [], [], LONGEST)[0]:
            yield None
            return
        if not (read := os.read(pipe, 65536)):
            return
        *lines, left = (left + read).split(b"\n")
        yield from (line.decode() for line in lines)


def fuzz(root: Path, mutations: int, seed: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Damages files of every kind, in turn.

    Args:
        root: an empty directory.
        mutations: how many.
        seed: decides them.

    Returns:
        How the mutations of each kind ended, and a line for each that ended wrong.
    """
    kinds = make_kinds(root / "whole")
    (root / "copies").mkdir()
    expected = {}
    for kind in kinds:
        copy = root / "copies" / "whole"
        shutil.copytree(kind.directory, copy)
        expected[kind.name] = kind.read(copy)
        shutil.rmtree(copy)
    counts: dict[str, Counter[str]] = {kind.name: Counter() for kind in kinds}
    wrong, first = [], 0
    while first < mutations:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            for stream in (1, 2):
                os.dup2(os.open(root / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            try:
                _work(kinds, expected, range(first, mutations), seed, root / "copies", writing)
            finally:
                os._exit(0)
        os.close(writing)
        begun: list[Any] | None = None
        for line in _lines(reading):
            if line is None:
                os.kill(child, signal.SIGKILL)
                break
            number, name, how, ended = json.loads(line)
            begun = None if ended is not None else [name, how]
            if ended is not None:
                counts[name][ended if ended in RIGHT else "WRONG"] += 1
                wrong += [] if ended in RIGHT else [f"{number}: {name}: {how}: {ended}"]
            first = number + 1
        os.close(reading)
        os.waitpid(child, 0)
        if begun is not None:  # it hangs, or has ended the process
            counts[begun[0]]["WRONG"] += 1
            wrong.append(f"{first - 1}: {begun[0]}: {begun[1]}: WRONG: a hang or a crash")
    return counts, wrong


def table(counts: dict[str, Counter[str]]) -> str:
    """Counts by kind of file and outcome."""
    outcomes = (*RIGHT, "WRONG")
    lines = [["files", *outcomes, "all"], ["---"] * (len(outcomes) + 2)]
    total: Counter[str] = sum(counts.values(), Counter())
    for name, found in [*counts.items(), ("**all**", total)]:
        lines.append([name, *(str(found[outcome]) for outcome in outcomes), str(sum(found.values()))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        counts, wrong = fuzz(Path(root), args.mutations, args.seed)
    print(table(counts))
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
