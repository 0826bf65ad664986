"""Other libraries' talk, silenced for a time."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


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
