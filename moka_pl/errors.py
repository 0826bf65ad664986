"""Errors that a user can fix; the command line prints them without a traceback."""

import errno
import sys
from collections.abc import Sequence
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


class MokaWarning(UserWarning):
    """Something that a user should know, and that stops nothing; the command line prints it in one line."""


def one_line(error: BaseException) -> str:
    """The whole message of another library's error in one line; its type where it has none.

    Nothing is cut off: such messages often end with the remedy.
    """
    return " ".join(str(error).split()) or type(error).__name__


_REMEDIES = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "free some of your quota, or choose a folder on another disk",
    errno.EROFS: "choose a folder on a disk that can be written to",
    errno.EACCES: "choose a place that you have the permission for",
    errno.EPERM: "choose a place that you have the permission for",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the path; the folder may have been deleted meanwhile",
    errno.ENOTDIR: "choose a path below a folder, not below a file",
    errno.EISDIR: "give a file, not a folder",
    errno.EEXIST: "choose another path",
    errno.EIO: "the disk or its connection fails; check the system's log",
    errno.ESTALE: "the network file system has lost it; try again",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or lower --data.init_args.num_workers",
    errno.ENFILE: "the system has too many open files; end other programs",
    errno.ENOMEM: "end other programs, or lower batch sizes",
}


def system_failure(error: BaseException) -> str | None:
    """Returns one line for what the operating system refused, with a remedy; None for other errors."""
    cause: BaseException | None = error
    while cause is not None:
        # Connections that break have libraries' own messages; a pipe's end is no failure.
        if isinstance(cause, OSError) and not isinstance(cause, ConnectionError) and cause.errno is not None:
            break
        cause = cause.__cause__
    else:
        return None
    paths = [str(path) for path in (cause.filename, cause.filename2) if path is not None]
    reason = cause.strerror or one_line(cause)
    remedy = _REMEDIES.get(cause.errno)
    return " -> ".join(paths) + (": " if paths else "") + reason + (f"; {remedy}" if remedy else "")


def printable(text: str, most: int | None = None, kept: str = "") -> str:
    """The text with whatever a terminal would act upon, or cannot show, written out as an escape.

    Args:
        text: The text.
        most: Most characters of it; a longer one is cut.
        kept: Characters that stay as they are, such as line breaks.
    """
    if most is not None and len(text) > most:
        text = f"{text[: most - 3]}..."
    return "".join(c if c in kept or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(names: Sequence[str], most: int) -> str:
    """The first ``most`` names, and how many more there are: ``a, b and 3 more``."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Terminated(KeyboardInterrupt):
    """Another signal than Ctrl-C has asked for the end, of which no part of a command makes anything else."""


def terminate(number: int, frame: object) -> None:
    """A handler of signals that ends a command as Ctrl-C does, so that it leaves nothing half-written."""
    raise Terminated


def end_interrupted(kept: str = "") -> NoReturn:
    """Ends the process after Ctrl-C with one line that says what was saved, and where."""
    print(f"\ninterrupted{'; ' if kept else ''}{kept}", file=sys.stderr)
    sys.exit(INTERRUPTED)
