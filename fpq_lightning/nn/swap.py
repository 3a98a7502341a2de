"""Classes that a module is turned into in place, and back.

The module stays the same object, so everything that refers to it (parents, hooks, tied uses) keeps doing so.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, TypeVar, cast

from torch import nn


class SwappedModule(nn.Module):
    """Base of classes that a plain module is turned into by `swap`, and back by `restore`.

    A subclass annotates every attribute that it adds to its plain class. `swap` takes a value for each of them, and
    `restore` removes them.

    Attributes:
        plain: the class that a module had before.
        own_attributes: names of the annotated attributes.
    """

    plain: ClassVar[type[nn.Module]]
    own_attributes: ClassVar[frozenset[str]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ours = [kind for kind in cls.__mro__ if issubclass(kind, SwappedModule) and kind is not SwappedModule]
        cls.own_attributes = frozenset(name for kind in ours for name in inspect.get_annotations(kind))

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Makes a plain module if there are arguments."""
        # Adapters (LoRA in peft) make their layers with `type(base_layer)(sizes)`; these must be plain layers. Copying
        # and unpickling pass no arguments.
        return cls.plain(*args, **kwargs) if args or kwargs else super().__new__(cls)


S = TypeVar("S", bound=SwappedModule)


def swap(module: nn.Module, kind: type[S], **state: Any) -> S:
    """Turns a module into another class in place.

    Args:
        module: of the plain class of `kind`. A swapped module is restored first.
        kind: the new class.
        state: a value for each attribute that the class annotates.

    Raises:
        TypeError: if an attribute has no value, or if a value is for no annotated attribute.
    """
    if wrong := kind.own_attributes ^ state.keys():
        raise TypeError(f"{kind.__name__} annotates other attributes than are given: {', '.join(sorted(wrong))}")
    restore(module)
    module.__class__ = kind
    for name, value in state.items():
        setattr(module, name, value)
    return cast(S, module)


def restore(module: nn.Module) -> nn.Module:
    """Turns a module back into its plain class in place; leaves plain modules as they are."""
    kind = type(module)
    if issubclass(kind, SwappedModule):
        for name in kind.own_attributes:
            delattr(module, name)
        module.__class__ = kind.plain
    return module


K = TypeVar("K", bound=SwappedModule)
_CLASSES: dict[tuple[type, type], Any] = {}


def class_for(kind: type[K], plain: type[nn.Module]) -> type[K]:
    """The class of a kind that modules of a plain class become, where the kind is not made for one class alone."""
    key = (kind, plain)
    if key not in _CLASSES:
        attributes = {"plain": plain, "__reduce__": _reduce}
        _CLASSES[key] = type(f"{plain.__name__}With{kind.__name__}", key, attributes)
    return cast(type[K], _CLASSES[key])


def _reduce(module: SwappedModule) -> Any:
    return _remade, type(module).__bases__, module.__getstate__()  # pickle does not find the class by its name


def _remade(kind: type[SwappedModule], plain: type[nn.Module]) -> nn.Module:
    """A module of a class of `class_for`, to be filled."""
    made: Any = class_for(kind, plain)
    return cast(nn.Module, made.__new__(made))
