"""Classes that a module is turned into in place, and back.

The module stays the same object, so everything that refers to it (parents, hooks, tied uses) keeps doing so.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, TypeVar, cast

from torch import nn


class SwappedModule(nn.Module):
    """Base of classes that a plain module is turned into by `swap`, and back by `restore`.

    Annotations of its subclasses declare the attributes that an instance has beyond those of its plain class. `swap`
    takes a value for each of them, and `restore` removes them.

    Attributes:
        plain: the class to which it goes back.
        own_attributes: names of what its annotations declare.
    """

    plain: ClassVar[type[nn.Module]]
    own_attributes: ClassVar[frozenset[str]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ours = [kind for kind in cls.__mro__ if issubclass(kind, SwappedModule) and kind is not SwappedModule]
        cls.own_attributes = frozenset(name for kind in ours for name in inspect.get_annotations(kind))

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Makes a plain module if there are arguments."""
        # Adapters (LoRA of peft) make their layers by `type(base_layer)(sizes)`, and those are to be plain. Copying and
        # unpickling call this without arguments.
        return cls.plain(*args, **kwargs) if args or kwargs else super().__new__(cls)


S = TypeVar("S", bound=SwappedModule)


def swap(module: nn.Module, kind: type[S], **state: Any) -> S:
    """Turns a module into another class in place.

    Args:
        module: of the plain class of `kind`, or swapped already: then it is restored first.
        kind: the class.
        state: a value for each attribute that the class declares.

    Raises:
        TypeError: if an attribute has no value, or a value no attribute.
    """
    if wrong := kind.own_attributes ^ state.keys():
        raise TypeError(f"{kind.__name__} declares other attributes than are given: {', '.join(sorted(wrong))}")
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
