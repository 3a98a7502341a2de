"""Digests find what was changed in files, and say which."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from fpq_lightning.utils import digests
from fpq_lightning.utils.digests import (
    changed_files,
    check_seal,
    digest_of_file,
    digest_of_tree,
    read_json_with_digest,
    seal,
    with_digest,
    write_digests,
)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with digests, of whose files the first 8 bytes are always looked at."""
    monkeypatch.setattr(digests, "HEAD", 8)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_bytes(bytes(range(100)))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("for people")
    write_digests(tmp_path)
    return tmp_path


def _flip(file: Path, place: int) -> None:
    contents = bytearray(file.read_bytes())
    contents[place] ^= 1
    file.write_bytes(contents)


def test_nothing_is_changed_in_what_was_just_written(written: Path) -> None:
    assert changed_files(written, whole=True) == {}
    assert json.loads((written / "digests.json").read_text()).keys() == {"unet/weights", "config.json"}


@pytest.mark.parametrize(("place", "found_at_once"), [(0, True), (7, True), (8, False), (99, False)])
def test_a_flipped_bit_is_found_in_the_whole_and_at_once_if_it_is_near_the_beginning(
    written: Path, place: int, found_at_once: bool
) -> None:
    weights = written / "unet" / "weights"
    _flip(weights, place)
    assert list(changed_files(written, whole=True)) == [weights]
    assert list(changed_files(written, whole=False)) == [weights] * found_at_once


def test_another_size_and_a_missing_file_are_found_at_once(written: Path) -> None:
    with (written / "unet" / "weights").open("ab") as handle:
        handle.write(b"x")
    (written / "config.json").unlink()
    found = {file.name: line for file, line in changed_files(written, whole=False).items()}
    assert "101 bytes of 100" in found["weights"]
    assert "is missing" in found["config.json"]


def test_files_for_people_may_change_and_a_directory_without_digests_is_not_judged(written: Path) -> None:
    (written / "README.md").write_text("more for people")
    assert changed_files(written, whole=True) == {}
    (written / "digests.json").unlink()
    (written / "config.json").unlink()
    assert changed_files(written, whole=True) == {}


@pytest.mark.parametrize(
    "contents", ["", "[1]", '{"a": 1}', '{"a": {"bytes": 1}}', '{"../a": {"bytes": 0}}', "[" * 10**5]
)
def test_damaged_digests_are_one_line_that_names_them(written: Path, contents: str) -> None:
    (written / "digests.json").write_text(contents)
    with pytest.raises(ValueError, match=r"digests\.json") as error:
        changed_files(written, whole=False)
    assert "\n" not in str(error.value)


def test_no_file_outside_of_the_directory_is_looked_at(written: Path) -> None:
    entry = {"bytes": 0, "head": "", "blake2b": ""}
    (written / "digests.json").write_text(json.dumps({"../../secret": entry}))
    with pytest.raises(ValueError, match="no file of the directory"):
        changed_files(written, whole=False)


def test_the_digest_of_a_file_is_that_of_blake2b(tmp_path: Path) -> None:
    contents = bytes(range(256)) * 1000
    (tmp_path / "a").write_bytes(contents)
    assert digest_of_file(tmp_path / "a") == hashlib.blake2b(contents, digest_size=16).hexdigest()
    assert digest_of_file(tmp_path / "a", 300) == hashlib.blake2b(contents[:300], digest_size=16).hexdigest()


def test_json_with_a_digest_comes_back_without_it_and_is_refused_once_changed(tmp_path: Path) -> None:
    values = {"a": [1, 2.5, None], "b": {"c": 1e-300, 4: True}}
    file = tmp_path / "a.json"
    file.write_text(json.dumps(with_digest(values)))
    assert read_json_with_digest(file) == json.loads(json.dumps(values))
    file.write_text(file.read_text().replace("2.5", "2.25"))
    with pytest.raises(ValueError, match=r"a\.json is not what was written"):
        read_json_with_digest(file)


def test_json_of_an_older_version_has_no_digest_and_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json_with_digest(tmp_path / "a.json") == {"a": 1}


def test_trees_have_one_digest_until_a_bit_a_shape_a_type_or_a_name_changes() -> None:
    tree = {"a": torch.arange(6.0), "b": [1, "x", None]}
    again = {"a": torch.arange(6.0), "b": [1, "x", None]}
    assert digest_of_tree(tree) == digest_of_tree(again)
    flipped = torch.arange(6.0)
    flipped.view(torch.int32)[3] ^= 1
    others = [
        {**tree, "a": flipped},
        {**tree, "a": tree["a"].reshape(2, 3)},
        {**tree, "a": tree["a"].view(torch.int32)},
        {"c": tree["a"], "b": tree["b"]},
        {**tree, "b": [1, "x", 0]},
    ]
    assert len({digest_of_tree(other) for other in [tree, *others]}) == 6


def test_a_sealed_file_is_known_by_its_name_and_its_bits(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"contents")
    check_seal(file)  # it has none
    seal(file)
    check_seal(file)
    assert file.read_bytes().startswith(b"contents")
    with pytest.raises(ValueError, match="not what was written"):
        check_seal(file.rename(tmp_path / "b"))
    (tmp_path / "b").rename(file)
    _flip(file, 2)
    with pytest.raises(ValueError, match="not what was written"):
        check_seal(file)
