"""Registries: what they hand out, and what they say of a name that they do not know."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fpq_lightning.utils.registry import Registry


@dataclass(frozen=True)
class Colour:
    name: str


def colours(*names: str) -> Registry[Colour]:
    registry: Registry[Colour] = Registry("colour")
    for name in names:
        registry.register(Colour(name))
    return registry


def test_items_are_found_by_name_and_listed_in_order() -> None:
    registry = colours("red", "blue", "green")
    assert registry["blue"] == Colour("blue")
    assert registry.names == ["red", "blue", "green"]
    assert [colour.name for colour in registry] == registry.names
    assert "red" in registry
    assert "pink" not in registry


def test_a_class_registers_itself_by_a_decorator() -> None:
    registry: Registry[type[Shape]] = Registry("shape")

    class Shape:
        name = "circle"

    assert registry.register(Shape) is Shape
    assert registry["circle"] is Shape


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["red"], "unknown colour 'pink': use red"),
        (["red", "blue"], "unknown colour 'pink': use red or blue"),
        (["red", "blue", "green"], "unknown colour 'pink': use red, blue or green"),
    ],
)
def test_an_unknown_name_is_refused_with_those_there_are(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        colours(*names)["pink"]


def test_a_name_is_registered_once() -> None:
    registry = colours("red")
    with pytest.raises(ValueError, match="colour 'red' is registered already"):
        registry.register(Colour("red"))
    with pytest.raises(ValueError, match="is registered already"), registry.temporarily(Colour("red")):
        pass
    assert "red" in registry


def test_a_temporary_item_is_gone_after_its_block_whatever_happens() -> None:
    registry = colours("red")
    with registry.temporarily(Colour("blue")) as blue:
        assert registry["blue"] is blue
    assert registry.names == ["red"]
    with pytest.raises(ValueError, match="unknown colour 'pink'"), registry.temporarily(Colour("blue")):
        registry["pink"]
    assert registry.names == ["red"]
