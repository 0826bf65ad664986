"""Errors that a user can mend; the command line prints them without a traceback."""

import sys
from typing import NoReturn

#: The status that a shell reports of a program that Ctrl-C has ended.
INTERRUPTED = 130


class MokaError(ValueError):
    """Base of all errors about what the user gave; the message names the value and the remedy."""


class ConfigError(MokaError):
    """An option has a value that cannot work."""


class BackboneError(MokaError):
    """The base model cannot be found, loaded or quantised."""


class AdapterError(MokaError):
    """An adapter cannot be injected, read or written."""


class DataError(MokaError):
    """Data that cannot be used: the message names the file, the line or row, the field and the remedy."""


def end_interrupted(kept: str = "") -> NoReturn:
    """Ends the process after Ctrl-C with one line, which says what is kept, and where."""
    print(f"\ninterrupted{'; ' if kept else ''}{kept}", file=sys.stderr)
    sys.exit(INTERRUPTED)
