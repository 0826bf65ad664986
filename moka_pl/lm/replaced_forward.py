"""Modules of one model that compute by another forward method than their class's.

A method bound to a module does not survive a pickle: it breaks it, or is the class's own again. Here the
module's class becomes a subclass with the method, which every process builds from the function that made it.
"""

import copyreg
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

Forward = Callable[..., Any]


def replace_forward(module: nn.Module, make: Callable[..., Forward], *options: Any) -> None:
    """Has a module compute by another forward method; copies and pickles of it do, too.

    Args:
        module: The module; its class becomes a subclass of the same name.
        make: Makes the method of the module's class and the options. A function that a pickle can name.
        *options: What else decides the method: hashable, and no lambda.
    """
    kind: Any = type(module)
    module.__class__ = _subclass(kind, make, options)


def restore_forward(module: nn.Module) -> None:
    """Undoes the last :func:`replace_forward` of a module."""
    kind: Any = type(module)
    module.__class__ = kind.recipe[0]


def forward_maker(module: nn.Module) -> Callable[..., Forward] | None:
    """Returns what made the forward method of a module, or None where it is its class's own."""
    kind: Any = type(module)
    return kind.recipe[1] if isinstance(kind, _Replaced) else None


def given(kind: type[nn.Module], forward: Forward) -> Forward:
    """For :func:`replace_forward`: a function that is the method as it is."""
    return forward


class _Replaced(type):
    """The kind of those subclasses, which a pickle names by the class and by what makes the method."""

    recipe: tuple[type[nn.Module], Callable[..., Forward], tuple[Any, ...]]


@cache
def _subclass(kind: Any, make: Callable[..., Forward], options: tuple[Any, ...]) -> Any:
    """The subclass of a class of modules whose method is made so."""
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    body = {**names, "forward": make(kind, *options), "recipe": (kind, make, options)}
    return _Replaced(kind.__name__, (kind,), body)


copyreg.pickle(_Replaced, lambda kind: (_subclass, kind.recipe))
