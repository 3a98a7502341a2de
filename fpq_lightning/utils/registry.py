"""A registry: named things of one kind, each entered where it is defined."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar


class Named(Protocol):
    """An object or class with a name."""

    @property
    def name(self) -> str:
        """The key in the registry."""


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """Items by name, in the order in which they were registered.

    Args:
        kind: what the items are, for error messages.

    Example:
        >>> METRICS = Registry("metric")
        >>> @METRICS.register
        ... class PSNR:
        ...     name = "psnr"
        >>> METRICS["psnr"] is PSNR
        True
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, item: T) -> T:
        """Adds an item under its `name` and returns it, so that it also works as a decorator.

        Raises:
            ValueError: if the name is taken.
        """
        if item.name in self._items:
            raise ValueError(f"{self.kind} {item.name!r} is registered already: choose another name")
        self._items[item.name] = item
        return item

    @contextmanager
    def temporarily(self, item: T) -> Iterator[T]:
        """Registers an item for the length of a block, as tests do."""
        self.register(item)
        try:
            yield item
        finally:
            del self._items[item.name]

    @property
    def names(self) -> list[str]:
        """All names."""
        return list(self._items)

    def __getitem__(self, name: str) -> T:
        """The item of a name.

        Raises:
            ValueError: if there is none; the message lists all names.
        """
        if name not in self._items:
            known = " or ".join(filter(None, [", ".join(self.names[:-1]), *self.names[-1:]]))
            raise ValueError(f"unknown {self.kind} {name!r}: use {known}")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[T]:
        return iter(self._items.values())
