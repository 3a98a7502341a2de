"""A run directory whose own files are damaged says which, in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fpq_lightning.training.run_directory import RunDirectory, RunState

PARTS = {"model": {"name": "tiny"}, "recipe": {"weights": ["fp4", 2.5, None]}}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run", PARTS)
    with directory.working():
        directory.checkpoints.mkdir()
        (directory.checkpoints / "last.ckpt").write_bytes(b"")
    return directory


def _with(**entries: Any) -> Callable[[Path], object]:
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_text(""),
    "truncated": lambda file: file.write_text(file.read_text()[:20]),
    "binary": lambda file: file.write_bytes(bytes(range(256))),
    "a list": lambda file: file.write_text("[1]"),
    "nothing": lambda file: file.write_text("null"),
    "no parts": lambda file: file.write_text('{"fingerprint": "abc"}'),
    "parts of text": _with(parts="x"),
    "other parts": _with(parts={**PARTS, "seed": 1}),
    "another fingerprint": _with(fingerprint="abc"),
    "deep": lambda file: file.write_text("[" * 10**5),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_fingerprint_is_one_line_that_names_it(run: RunDirectory, damage: str) -> None:
    file = run.path / "fingerprint.json"
    assert run.state() is RunState.UNFINISHED
    DAMAGES[damage](file)
    with pytest.raises(ValueError, match=r"fingerprint\.json") as error:
        run.state()
    assert "\n" not in str(error.value)


def test_a_pipe_in_place_of_the_fingerprint_is_not_waited_for(run: RunDirectory) -> None:
    (run.path / "fingerprint.json").unlink()
    os.mkfifo(run.path / "fingerprint.json")
    with pytest.raises(ValueError, match="choose another --run_dir"):
        run.state()


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda place: place.symlink_to("nowhere")])
def test_what_is_no_file_in_place_of_both_checkpoints_is_no_beginning(
    run: RunDirectory, make: Callable[[Path], object]
) -> None:
    for file in run.checkpoint_files:
        file.unlink(missing_ok=True)
        make(file)
    assert run.state() is RunState.UNFINISHED
    with pytest.warns(UserWarning, match="the one before it"), pytest.raises(ValueError, match="no checkpoint in"):
        run.newest_checkpoint()
