"""The rooms of the package: each says its purpose in a line, and imports run one way."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

CHECKOUT = Path(__file__).parents[1]
PACKAGE = CHECKOUT / "fpq_lightning"
ROOMS = sorted(file.parent for file in PACKAGE.glob("*/__init__.py"))


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("fpq_lightning", cache_dir=None)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_each_room_says_its_purpose_in_one_line(room: Path) -> None:
    purpose = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    assert purpose is not None
    assert purpose.endswith(".")
    assert "\n" not in purpose


@pytest.mark.parametrize("room", [room.name for room in ROOMS])
def test_no_room_has_an_import_circle(graph: grimp.ImportGraph, room: str) -> None:
    """Of files or of folders within the room; imports for type annotations count."""
    name = f"fpq_lightning.{room}"
    inside = {name, *graph.find_descendants(name)}
    circles = [
        chain
        for importer in sorted(inside)
        for imported in sorted(graph.find_modules_directly_imported_by(importer) & inside)
        if (chain := graph.find_shortest_chain(imported, importer))
    ]
    assert not circles


def test_the_contracts_name_every_room() -> None:
    contracts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    order = next(contract for contract in contracts if contract["type"] == "layers")
    named = {room.strip() for layer in order["layers"] for room in layer.split("|")}
    files = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"}
    assert named == files | {room.name for room in ROOMS}
    assert order["exhaustive"]  # the linter itself refuses a new room without a place


def test_imports_keep_the_contracts() -> None:
    # In a process of its own: the linter disables the loggers of the process that it runs in.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    found = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
