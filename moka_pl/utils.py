"""Other libraries' talk, silenced for a time."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LIGHTNING = ("lightning.pytorch", "lightning.fabric", "lightning_utilities.core.rank_zero")


@contextmanager
def quiet(*names: str, below: int = logging.WARNING) -> Iterator[None]:
    """Runs the body without what some loggers have to say, and leaves their levels as they were.

    Args:
        *names: Names of the loggers.
        below: Messages of lower levels are dropped.
    """
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
def quiet_lightning() -> Iterator[None]:
    """Runs the body without Lightning's notes on the machine and on every trainer."""
    with quiet(*_LIGHTNING), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield
