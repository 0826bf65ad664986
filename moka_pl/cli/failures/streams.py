"""The standard streams and the words of a command, made fit for use or refused before anything is done."""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

from moka_pl.errors import ConfigError, system_failure

_STDOUT = 1
_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def open_streams() -> None:
    """Opens streams that a caller has closed (``>&-``), and has the others write any character.

    The system gives their free numbers to the next files that are opened, a checkpoint say, into which
    whatever a library prints would then go.
    """
    for number, (name, mode) in enumerate(_STREAMS):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number, which this one is: those below have been seen to.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 it stays open
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        # Latin-1 has no α, and UTF-8 none of the bytes of a name that is in Latin-1.
        if isinstance(stream, TextIOWrapper) and (stream.errors == "strict" or not _is_utf8(stream.encoding)):
            stream.reconfigure(errors="backslashreplace")


def flush_output(failed: bool = False) -> None:
    """Writes out what is still buffered, where it can be handled, not at the interpreter's end.

    Args:
        failed: Whether the command has failed already, and said why.

    Raises:
        BrokenPipeError: If its reader has gone.
        SystemExit: If it cannot be written, on a full disk, say.
    """
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        if not failed:
            with suppress(OSError):
                told = f"moka_pl: error: the output cannot be written: {system_failure(error)}"
                print(told, file=sys.stderr, flush=True)
            sys.exit(2)


def discard_output() -> None:
    """Lets what is still buffered go nowhere, rather than into a complaint at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)


def check_words(words: Iterable[str]) -> None:
    """Refuses words, and a current folder, of bytes that are no text: most libraries take no such paths.

    Raises:
        ConfigError: Naming the first one.
    """
    try:
        folder = str(Path.cwd())
    except OSError as error:
        raise ConfigError(
            f"the current folder is gone or closed ({error.strerror}); change to another"
        ) from error
    _check(folder, "the current folder", "rename it")
    for word in words:
        _check(word, "the argument", "rename the file, or convert the text")


def _check(word: str, what: str, remedy: str) -> None:
    try:
        word.encode()
    except UnicodeEncodeError:
        if not _is_utf8(sys.getfilesystemencoding()):
            remedy = "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        raise ConfigError(f"{what} {word!r} is not in UTF-8; {remedy}") from None


def _is_utf8(encoding: str) -> bool:
    return encoding.lower().replace("-", "") == "utf8"
