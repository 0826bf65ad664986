"""Errors that a user can fix; the command line prints them without a traceback."""

import sys
from typing import ClassVar, NoReturn

#: Exit status of a program ended by Ctrl-C or a signal that asks it to end, with everything saved.
INTERRUPTED = 130


class MokaError(ValueError):
    """Base class of errors in user input; the message names the value and the remedy.

    Attributes:
        status: The exit status of a command that it ends.
    """

    status: ClassVar[int] = 2


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


class NonFiniteError(MokaError):
    """Training was ended because its numbers are not finite.

    Args:
        message: What happened, and the remedies.
        usable: Whether the weights still give a finite loss, and so are worth saving.
    """

    status: ClassVar[int] = 3

    def __init__(self, message: str, usable: bool = False) -> None:
        super().__init__(message)
        self.usable = usable


def one_line(error: BaseException) -> str:
    """The whole message of another library's error in one line; its type where it has none.

    Nothing is cut off: such messages often end with the remedy.
    """
    return " ".join(str(error).split()) or type(error).__name__


def end_interrupted(kept: str = "") -> NoReturn:
    """Ends the process after Ctrl-C with one line that says what was saved, and where."""
    print(f"\ninterrupted{'; ' if kept else ''}{kept}", file=sys.stderr)
    sys.exit(INTERRUPTED)
