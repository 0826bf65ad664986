"""Folders that are written to later."""

import os
from pathlib import Path

from moka_pl.errors import ConfigError


def make_folder(folder: Path, option: str) -> None:
    """Makes a folder, so that one which cannot be written to shows before the work whose results it is for.

    Args:
        folder: The folder; its parents are made, too.
        option: Name of the option that it comes from.

    Raises:
        ConfigError: If it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "not allowed"
    except OSError as error:
        reason = error.strerror or type(error).__name__
    if reason:
        raise ConfigError(f"{option} {folder}: nothing can be written there ({reason}); name another folder")
