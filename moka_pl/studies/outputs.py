"""Files that scripts write: their options refuse, before any work, what a user would not get back.

The functions here are types of options, for the parser: a file that is there is replaced only where it is
empty, or what the same script has written before.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.errors import ConfigError
from moka_pl.utils import existing_folder, replaced_file, unwritable_reason

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: How pictures begin, by suffix. All hold the name of the library that has drawn them.
_PICTURES = {".png": b"\x89PNG\r\n\x1a\n", ".pdf": b"%PDF-", ".svg": b"<?xml"}
_DRAWN_BY = b"Matplotlib"

#: What the help of an option says of a file that is there.
REPLACED = "replaces one that this script has written, and nothing else"
REPLACED_PICTURE = "replaces one that Matplotlib has drawn, and nothing else"


def json_output(is_own: Callable[[Any], bool]) -> Callable[[str], Path]:
    """Returns the type of an option for a JSON file.

    Args:
        is_own: Whether the content of a file is one that the script has written.
    """

    def parse(text: str) -> Path:
        return _checked(text, lambda contents: is_own(json.loads(contents)))

    return parse


def json_lines_output(is_own: Callable[[Any], bool]) -> Callable[[str], Path]:
    """Returns the type of an option for a file with a JSON value a line.

    Args:
        is_own: Whether a line is one that the script has written.
    """

    def parse(text: str) -> Path:
        return _checked(text, lambda held: all(is_own(json.loads(line)) for line in held.splitlines()))

    return parse


def text_output(begin: str) -> Callable[[str], Path]:
    """Returns the type of an option for a text.

    Args:
        begin: How all texts of the script begin.
    """

    def parse(text: str) -> Path:
        return _checked(text, lambda contents: contents.startswith(begin.encode()))

    return parse


def picture_output(text: str) -> Path:
    """The type of an option for a picture, which replaces one that Matplotlib has drawn."""
    begin = _PICTURES.get(Path(text).suffix.lower())
    if begin is None:
        raise argparse.ArgumentTypeError(
            f"{text} is no picture; give it a name that ends with .png, .pdf or .svg"
        )
    return _checked(text, lambda contents: contents.startswith(begin) and _DRAWN_BY in contents)


def png_output(text: str) -> Path:
    """The type of an option for a picture whose colours are reduced: it has no trace of what has drawn it."""
    return _checked(text, lambda contents: contents.startswith(_PICTURES[".png"]))


def check_file(option: str, file: Path, parse: Callable[[str], Path]) -> None:
    """Refuses a file in the folder of an option, before any work.

    Args:
        option: The option.
        file: The file that will be written.
        parse: One of the types of this module.

    Raises:
        ConfigError: It cannot be written without loss.
    """
    try:
        parse(str(file))
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{option}: {error}") from None


def has_keys(*keys: str) -> Callable[[Any], bool]:
    """Returns whether something is a JSON object with all of these keys.

    Args:
        *keys: The keys.
    """
    return lambda content: isinstance(content, dict) and set(keys) <= content.keys()


def save_figure(figure: "Figure", file: Path) -> None:
    """Draws a picture in the format of its name; one that is there is replaced only by a whole one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(file) as stream:
        figure.savefig(stream, format=file.suffix[1:].lower())


def _checked(text: str, is_own: Callable[[bytes], bool]) -> Path:
    """Returns a file that can be written without loss.

    Raises:
        ArgumentTypeError: Of another file, which argparse reports with the option's name.
    """
    file = Path(text)
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
    try:
        contents = file.read_bytes() if file.is_file() else b""
        own = is_own(contents) if contents else not file.exists() or file.is_file()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror or error}") from error
    except (ValueError, RecursionError):  # no JSON, or no UTF-8
        own = False
    if not own:
        raise argparse.ArgumentTypeError(
            f"{text} is there already, and is nothing that this script has written; choose another file"
        )
    # The folder is made with the file only: another option may yet be refused.
    if (reason := unwritable_reason(existing_folder(file.parent))) is not None:
        raise argparse.ArgumentTypeError(f"{text}: cannot write there ({reason}); choose another file")
    return file
