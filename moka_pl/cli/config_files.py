"""Configuration files and their YAML, read within bounds: a stranger's file costs neither memory nor time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from moka_pl.cli.configs import find_config
from moka_pl.errors import ConfigError, one_line

#: The largest file; most have a thousandth of it.
MAX_BYTES = 4 << 20
#: Most values, with every alias written out: jsonargparse copies all of them for each item of a list.
MAX_VALUES = 1_000
#: How deep values may lie in each other.
MAX_DEPTH = 40
#: Most digits of a number; Python takes long over more.
_MAX_DIGITS = 1_000

#: The parsers' name for YAML that is read by :func:`parse_yaml`.
YAML_MODE = "bounded_yaml"

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class BoundedYamlError(yaml.YAMLError):
    """YAML that is too large, too deep, or says the same key twice."""


def read_config(file: Path, option: str) -> dict[str, Any]:
    """Returns a configuration; refuses a file that is none before all of it is read.

    Args:
        file: Its path.
        option: How it was named, for the error.

    Raises:
        ConfigError: If it is no mapping in YAML and UTF-8, or larger than any configuration.
    """
    text = read_text(file, option)
    try:
        written = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{option} {file} is no YAML of a configuration: {one_line(error)}") from error
    if not isinstance(written, dict):
        raise ConfigError(
            f"{option} {file}: a configuration is a mapping of options, not {type(written).__name__}"
        )
    return written


def named_model(arguments: Sequence[str]) -> str | None:
    """Returns the class of the model that a command line or a file of its names; None where none does.

    Args:
        arguments: The command line, of which ``--model NAME`` and the files of ``--config`` are looked at.

    Raises:
        ConfigError: If such a file is no configuration.
    """
    named = None
    given = [part for argument in arguments for part in argument.split("=", 1)]
    for option, value in pairwise(given):
        if option in ("--model", "--model.class_path"):
            named = value
        elif option in ("--config", "-c") and Path(found := find_config(value)).is_file():
            model = read_config(Path(found), "--config").get("model")
            named = model.get("class_path", named) if isinstance(model, dict) else named
    return named if isinstance(named, str) else None


def read_text(file: Path, option: str) -> str:
    """Returns the text of a file of YAML; see :func:`read_config`."""
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(
                f"{option} {file}: {size:,} bytes are too many for a configuration (at most {MAX_BYTES:,}); "
                "is it another file?"
            )
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{option} {file}: not a text in UTF-8 (byte {error.start + 1}); save it as UTF-8, or give "
            "a YAML file"
        ) from error
    except OSError as error:
        raise ConfigError(f"{option} {file}: cannot be read ({error.strerror or error})") from error
    if not text.strip():
        raise ConfigError(f"{option} {file}: the file is empty")
    return text


def parse_yaml(text: str) -> Any:
    """Parses YAML as jsonargparse does, but refuses what is too large, too deep or said twice."""
    return _built(text, get_loader("yaml"), MAX_VALUES)


def load_yaml(text: str) -> Any:
    """Parses YAML by PyYAML's own rules, within bounds.

    Raises:
        yaml.YAMLError: If the text is no YAML, or out of bounds.
    """
    return _built(text, lambda text: yaml.load(text, _Loader), 100 * MAX_VALUES)


def _built(text: str, load: Callable[[str], Any], most: int) -> Any:
    check_yaml(text, most)
    try:
        return load(text)
    # PyYAML's constructors let such errors pass: ``!!int x``, ``!!bool x``, ``!!timestamp x``.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BoundedYamlError(f"a value cannot be read: {error or type(error).__name__}") from error


def check_yaml(text: str, most: int = MAX_VALUES) -> None:
    """Raises a ``YAMLError`` if a text is too large, too deep, or has a key twice; nothing is built."""
    if len(text) > MAX_BYTES:
        raise BoundedYamlError(f"{len(text):,} characters are too many for YAML (at most {MAX_BYTES:,})")
    if len(text) > _MAX_DIGITS or any(mark in text for mark in "\n{[&*"):  # most values are one word
        _count(text, most)


@dataclass
class _Open:
    """A mapping or list whose end has not been read yet."""

    mapping: bool
    anchor: str | None
    size: int = 1
    children: int = 0
    keys: dict[str, int] = field(default_factory=dict)


def _count(text: str, most: int) -> None:
    """Walks over the events of a text, which hold no more than one value each."""
    open_, sizes = [_Open(False, None)], dict[str, int]()
    for event in yaml.parse(text, _Loader):
        mark: Any = event.start_mark
        line, top = mark.line + 1, open_[-1]
        size = 0
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise BoundedYamlError(
                    f"line {line}: no complete value before *{event.anchor} is named &{event.anchor}"
                )
            size = sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if top.mapping and top.children % 2 == 0 and event.value != "<<":
                _check_key(event.value, line, top.keys)
            if event.value.isdigit() and len(event.value) > _MAX_DIGITS:
                raise BoundedYamlError(
                    f"line {line}: a number has {len(event.value):,} digits; at most {_MAX_DIGITS:,} are read"
                )
            if event.anchor:
                sizes[event.anchor] = size
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append(_Open(isinstance(event, yaml.MappingStartEvent), event.anchor))
            if len(open_) > MAX_DEPTH:
                raise BoundedYamlError(f"line {line}: values are nested more than {MAX_DEPTH} deep")
            continue
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = open_.pop()
            size, top = closed.size, open_[-1]
            if closed.anchor:
                sizes[closed.anchor] = size
        else:
            continue
        top.size += size
        top.children += 1
        if top.size > most:
            raise BoundedYamlError(
                f"line {line}: more than {most:,} values, aliases (*name) written out; long filters belong "
                "in a .json file"
            )


def _check_key(key: str, line: int, keys: dict[str, int]) -> None:
    if key in keys:
        raise BoundedYamlError(
            f"line {line}: key {key!r} stands in line {keys[key]} already, which the last would "
            "replace; remove one"
        )
    keys[key] = line


set_loader(YAML_MODE, parse_yaml, (yaml.YAMLError, RecursionError))
