"""Errors that a user can fix; the command line prints them without a traceback."""

import sys
from typing import NoReturn

#: Exit status of a program ended by Ctrl-C.
INTERRUPTED = 130


class MokaError(ValueError):
    """Base class of errors in user input; the message names the value and the remedy."""


class ConfigError(MokaError):
    """An option has an invalid value."""


class BackboneError(MokaError):
    """The base model cannot be found, loaded or quantised."""


class AdapterError(MokaError):
    """An adapter cannot be injected, read or written."""


class CheckpointError(MokaError):
    """A checkpoint cannot be written."""


class DataError(MokaError):
    """Data cannot be used; the message names the file, the line or row, the field and the remedy."""


def one_line(error: BaseException) -> str:
    """The whole message of another library's error in one line; its type where it has none.

    Nothing is cut off: such messages often end with the remedy.
    """
    return " ".join(str(error).split()) or type(error).__name__


def end_interrupted(kept: str = "") -> NoReturn:
    """Ends the process after Ctrl-C with one line that says what was saved, and where."""
    print(f"\ninterrupted{'; ' if kept else ''}{kept}", file=sys.stderr)
    sys.exit(INTERRUPTED)
