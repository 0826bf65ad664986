"""Folders that are written to later."""

import tempfile
from pathlib import Path

from moka_pl.errors import ConfigError


def make_folder(folder: Path, option: str) -> None:
    """Makes a folder, so that one which cannot be written to shows before the work whose results it is for.

    Args:
        folder: The folder; its parents are made, too.
        option: Name of the option that it comes from.

    Raises:
        ConfigError: If nothing can be written there.
    """
    if (obstacle := writing_obstacle(folder)) is not None:
        raise ConfigError(
            f"{option} {folder}: nothing can be written there ({obstacle}); name another folder"
        )


def writing_obstacle(folder: Path) -> str | None:
    """Makes a folder and says why no file can be written there; None if one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
