"""What is no file is refused and never waited for; links stay in their directory, or in the cache of the hub."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from fpq_lightning.utils.reading import check_inside, check_tree, read_json, refuse_special


def _socket(place: Path) -> None:
    here = os.getcwd()
    os.chdir(place.parent)  # names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(place.name)
    finally:
        os.chdir(here)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda place: place.symlink_to("/dev/zero"),
    "a directory": Path.mkdir,
    "a socket": _socket,
    "cannot be read": lambda place: place.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused_by_its_kind(tmp_path: Path, kind: str) -> None:
    SPECIAL[kind](tmp_path / "a.json")
    with pytest.raises(ValueError, match=rf"a\.json (is )?{kind}"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("kind", [kind for kind in SPECIAL if kind != "a directory"])
def test_a_tree_with_what_is_no_file_is_refused_at_any_depth(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    check_tree(tmp_path)
    SPECIAL[kind](tmp_path / "a" / "b" / "c")
    with pytest.raises(ValueError, match=r"put the file in its place|cannot be read"):
        check_tree(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[" * 10**5, "\xff", "1" * 10**4])
def test_damaged_json_is_one_line_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"a\.json cannot be read") as error:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["unet", "unet/weights"])
def test_a_link_that_leads_out_is_refused_and_one_that_stays_is_not(tmp_path: Path, part: str) -> None:
    (tmp_path / "other" / "unet").mkdir(parents=True)
    (tmp_path / "other" / "unet" / "weights").write_bytes(b"other")
    (tmp_path / "model" / "vae").mkdir(parents=True)
    (tmp_path / "model" / "vae" / "weights").write_bytes(b"own")
    (tmp_path / "model" / "again").symlink_to("vae/weights")
    check_tree(tmp_path / "model")
    (tmp_path / "model" / part).parent.mkdir(exist_ok=True)
    (tmp_path / "model" / part).symlink_to(tmp_path / "other" / part)
    with pytest.raises(ValueError, match="leads out of"):
        check_tree(tmp_path / "model")


def test_a_directory_that_is_a_link_itself_is_read(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"own")
    (tmp_path / "link").symlink_to("model")
    check_tree(tmp_path / "link")


def test_snapshots_of_the_hub_are_links_to_the_files_beside_them(tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    unet = cache / "snapshots" / "abc" / "unet"
    unet.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "123").write_bytes(b"weights")
    (unet / "weights").symlink_to("../../../blobs/123")
    check_tree(unet.parent)
    check_tree(unet)
    (tmp_path / "elsewhere").write_bytes(b"other")
    (unet / "other").symlink_to("../../../../elsewhere")
    with pytest.raises(ValueError, match="leads out of"):
        check_inside(unet / "other", unet)


def test_links_of_a_model_in_full_precision_may_lead_anywhere_but_to_no_pipe(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").symlink_to(tmp_path / "weights")
    refuse_special(tmp_path / "model")
    os.mkfifo(tmp_path / "model" / "pipe")
    with pytest.raises(ValueError, match="is a pipe"):
        refuse_special(tmp_path / "model")
