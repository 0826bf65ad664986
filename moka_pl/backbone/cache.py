"""The folder for converted models."""

import os
from pathlib import Path


def cache_root(override: str | None = None) -> Path:
    """Returns the cache folder: ``override``, else ``$MOKA_PL_CACHE``, else the user's cache folder."""
    if override:
        return Path(override).expanduser()
    if chosen := os.environ.get("MOKA_PL_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moka_pl"
