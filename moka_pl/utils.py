"""Small helpers: silencing other libraries, and checking output folders."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moka_pl.errors import ConfigError


@contextmanager
def silenced(*names: str, below: int = logging.WARNING) -> Iterator[None]:
    """Runs the body with some loggers silenced below a level, and restores their levels."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(below)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def make_folder(folder: Path, option: str) -> None:
    """Makes a folder and its parents, and reports an unwritable one before any work.

    Raises:
        ConfigError: If the folder is not writable; it names the option.
    """
    if (reason := unwritable_reason(folder)) is not None:
        raise ConfigError(f"{option} {folder}: cannot write there ({reason}); choose another folder")


def unwritable_reason(folder: Path) -> str | None:
    """Makes a folder and returns why no file can be written there, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
