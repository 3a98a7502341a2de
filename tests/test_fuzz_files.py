"""Damaged files of every kind are refused in one line, gone round, or read as they were."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import pytest
from fuzz_files import MUTATIONS, Kind, NotApplicableError, fuzz, outcome_of

N = 64
HEADER = json.dumps({name: {"dtype": "U8", "shape": [2, i], "data_offsets": [0, 2]} for i, name in enumerate("ab")})


def test_no_damage_goes_unnoticed_crashes_or_hangs(tmp_path: Path) -> None:
    counts, wrong = fuzz(tmp_path, N, seed=1)
    assert wrong == []
    assert sum(sum(found.values()) for found in counts.values()) == N
    assert all(sum(found.values()) for found in counts.values())  # every kind of file


def test_every_mutation_changes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    draw = random.Random(0)
    for number, (name, change) in enumerate(MUTATIONS.items()):
        for suffix in (".json", ".safetensors"):
            file, other = (tmp_path / f"{number}" / f"{n}{suffix}" for n in "ab")
            file.parent.mkdir(exist_ok=True)
            text = HEADER.encode()
            text = text if suffix == ".json" else len(text).to_bytes(8, "little") + text + b"12345"
            file.write_bytes(text), other.write_bytes(text + b" ")
            try:
                for _ in range(20):  # swapped tensors may be one
                    change(file, draw)
                    if not file.is_file() or file.read_bytes() != text:
                        break
                else:
                    raise AssertionError(name)
            except NotApplicableError:
                assert suffix == (".json" if name.endswith(("tensor", "tensors", "dtype", "shape")) else ".safetensors")


def test_other_values_an_unexpected_error_and_several_lines_are_wrong(tmp_path: Path) -> None:
    def outcome(read: object) -> str:
        return outcome_of(Kind("x", tmp_path, "*", read, "old"), tmp_path, "new").split(":")[0]  # type: ignore[arg-type]

    def fail(error: Exception) -> object:
        def read(path: Path) -> str:
            raise error

        return read

    assert outcome(lambda path: "new") == "harmless"
    assert outcome(lambda path: "old") == "recovered"
    assert outcome(fail(ValueError("a is damaged"))) == "refused"
    assert outcome(lambda path: "other") == "WRONG"
    assert outcome(fail(ValueError("a\nb"))) == "WRONG"
    assert outcome(fail(ValueError(""))) == "WRONG"
    assert outcome(fail(TypeError("a"))) == "WRONG"
