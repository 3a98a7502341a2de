"""Values of options, checked against the annotations of what takes them, however they were given."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Within:
    """The numbers that an option takes, as a part of its annotation: ``Annotated[float, Within(0, 1)]``.

    Attributes:
        least: the smallest one.
        most: the largest one.
    """

    least: float
    most: float = math.inf

    def __str__(self) -> str:
        return f"from {self.least} to {self.most}" if math.isfinite(self.most) else f"of at least {self.least}"


MOST = 2**31 - 1
"""Of anything that can be counted."""

Count = Annotated[int, Within(1, MOST)]
CountOrZero = Annotated[int, Within(0, MOST)]


def check_values(owner: object, option: str) -> None:
    """Compares the attributes of an object with the annotations of the arguments that it was made of.

    Args:
        owner: has an attribute for each argument.
        option: that it is the value of; empty for the command itself.

    Raises:
        ValueError: if one is of another type, a word that is not known, not finite, or out of its range.
    """
    for name, hint in get_type_hints(type(owner).__init__, include_extras=True).items():
        if hasattr(owner, name) and not _fits(value := getattr(owner, name), hint):
            full = f"{option}.{name}" if option else name
            raise ValueError(f"{full} must be {_described(hint)}, got {_shown(value)}")


def _fits(value: Any, hint: Any) -> bool:
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Annotated:
        limits = [limit for limit in arguments[1:] if isinstance(limit, Within)]
        return _fits(value, arguments[0]) and all(limit.least <= value <= limit.most for limit in limits)
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if kind is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if kind is list:
        return isinstance(value, (list, tuple)) and all(_fits(item, arguments[0]) for item in value)
    if kind is dict:
        is_mapping = isinstance(value, Mapping)
        return is_mapping and all(_fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items())
    if hint in (int, float):
        is_number = isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    if hint is str:
        return isinstance(value, (str, os.PathLike))
    if hint is Any:
        return not isinstance(value, float) or math.isfinite(value)
    return isinstance(value, hint) if isinstance(hint, type) else True


_WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    Any: "finite values",
}


def _described(hint: Any) -> str:
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return " ".join([_described(arguments[0]), *(str(a) for a in arguments[1:])])
    if kind in (Union, UnionType):
        return " or ".join(map(_described, arguments))
    if kind is Literal:
        *others, last = map(str, arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if kind in (list, dict):
        return f"{'a list' if kind is list else 'a mapping'} of {_described(arguments[-1])}"
    return _WORDS.get(hint, getattr(hint, "__name__", "something"))


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
