"""Checks values against type hints: a stranger's JSON, like a script, may give any field any value."""

import types
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moka_pl.errors import ConfigError

#: More entries of one list or mapping, or characters of one text, than any adapter has.
_MOST = 1_000_000
#: Larger whole numbers are no floats.
_LARGEST = 2**1000
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def check_fields(config: Any) -> None:
    """Refuses a dataclass whose fields are not of the types that it declares.

    Raises:
        ConfigError: Naming the field and its value.
    """
    check_values(type(config), {field.name: getattr(config, field.name) for field in fields(config)})


def check_values(kind: type, values: Mapping[str, Any], where: str = "") -> None:
    """Refuses values by name that do not have the types of the fields of a dataclass or typed dictionary.

    Args:
        kind: The class whose type hints count; names without one are not checked.
        values: Values by name.
        where: What stands before the names in messages.

    Raises:
        ConfigError: Naming the field and its value.
    """
    for name, hint in _hints(kind).items():
        if name in values:
            check_value(values[name], hint, where + name)


def check_value(value: Any, hint: Any, name: str) -> None:
    """Refuses a value that is not of a type.

    A whole number counts as a number, unless no float is as large; true and false are no numbers.

    Args:
        value: The value.
        hint: The type; kinds of types that are not known here allow anything.
        name: What messages call the value.

    Raises:
        ConfigError: Naming the value.
    """
    if not _fits(value, hint):
        raise ConfigError(f"{name} must be {_describe(hint)}, not {shown(value)}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except (NameError, TypeError):  # names that another library imports for type checkers only
        return {}


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin in (list, set, tuple):
        sized = isinstance(value, (list, tuple, set)) and len(value) <= _MOST
        return sized and all(_fits(item, arguments[0]) for item in value if arguments)
    if origin is dict or hint is dict:
        sized = isinstance(value, Mapping) and len(value) <= _MOST
        key, item = arguments or (Any, Any)
        return sized and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    if hint in (int, float):
        number = isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
        return number and (isinstance(value, float) or hint is int or abs(value) < _LARGEST)
    if hint is str or (isinstance(hint, type) and issubclass(hint, Enum)):
        return isinstance(value, (str, Enum)) and len(str(value)) <= _MOST
    if hint in (bool, type(None)):
        return isinstance(value, hint)
    return True


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(argument) for argument in arguments))
    if origin is Literal:
        return f"one of {', '.join(str(argument) for argument in arguments)}"
    if origin in (list, set, tuple):
        return "a list" if not arguments else f"a list of {_plural(arguments[0])}"
    if origin is dict or hint is dict:
        return "a mapping"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "a text"
    return _NAMES.get(hint, str(hint))


def _plural(hint: Any) -> str:
    names = {int: "whole numbers", float: "numbers", str: "texts"}
    return names.get(hint, "lists" if get_origin(hint) is list else "values")


def shown(value: Any) -> str:
    """Returns a value as text for a message, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no whole numbers of thousands of digits
        return f"a {type(value).__name__} of absurd size"
    return text if len(text) <= 80 else f"{text[:80]}…"
