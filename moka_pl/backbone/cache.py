"""The folder for converted models."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moka_pl.errors import BackboneError


def cache_root(override: str | None = None) -> Path:
    """Returns the cache folder: ``override``, else ``$MOKA_PL_CACHE``, else the user's cache folder."""
    if override:
        return Path(override).expanduser()
    if chosen := os.environ.get("MOKA_PL_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moka_pl"


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Makes a folder in the cache and runs the body, which writes there.

    Args:
        folder: The folder.

    Raises:
        BackboneError: If the folder cannot be made or written, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise BackboneError(
            f"cannot write to the cache folder {folder}: {error.strerror or error}. Free some space, or set "
            "MOKA_PL_CACHE (or backbone.cache_dir) to another folder"
        ) from error
