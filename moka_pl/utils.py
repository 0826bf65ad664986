"""Small helpers of all layers: other libraries silenced for a time, and folders that are written to later."""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moka_pl.errors import ConfigError

_LIGHTNING = ("lightning.pytorch", "lightning.fabric", "lightning_utilities.core.rank_zero")


@contextmanager
def silenced(*names: str, below: int = logging.WARNING) -> Iterator[None]:
    """Runs the body without some loggers' messages below a level, and leaves their levels as they were."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(below)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def silenced_lightning() -> Iterator[None]:
    """Runs the body without Lightning's notes on the machine and on every trainer."""
    with silenced(*_LIGHTNING), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


def make_folder(folder: Path, option: str) -> None:
    """Makes a folder and its parents, so that an unwritable one shows before the work whose results it takes.

    Raises:
        ConfigError: If nothing can be written there; it names the option that the folder comes from.
    """
    if (reason := unwritable_reason(folder)) is not None:
        raise ConfigError(f"{option} {folder}: nothing can be written there ({reason}); name another folder")


def unwritable_reason(folder: Path) -> str | None:
    """Makes a folder and returns why no file can be written there, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
