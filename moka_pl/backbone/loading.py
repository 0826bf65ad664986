"""Helpers for loading with transformers: errors, progress bars, the cache folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moka_pl.errors import BackboneError, one_line
from moka_pl.utils import expanded, space_shortage


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Runs the body; turns errors of transformers into one line that names the model.

    Raises:
        BackboneError: If a file is missing, damaged or of an unknown kind, or memory runs out.
    """
    try:
        yield
    except BackboneError:
        raise
    except Exception as error:  # tokenizers raises Exception itself, and safetensors and pyo3 their own kinds
        if "trust_remote_code" in str(error):
            raise BackboneError(
                f"{name} cannot be loaded: it needs code of its own (auto_map), which moka_pl never runs; "
                "give a model that transformers itself knows"
            ) from error
        raise BackboneError(f"{name} cannot be loaded: {one_line(error)}") from error


@contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Runs the body with transformers' progress bars, if the user has them on and ``show`` is set."""
    from transformers.utils import logging

    if show or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def cache_root(override: str | None = None) -> Path:
    """Returns the cache folder: ``override``, else ``$MOKA_PL_CACHE``, else the user's cache folder."""
    if override:
        return expanded(override)
    if chosen := os.environ.get("MOKA_PL_CACHE"):
        return expanded(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moka_pl"


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Makes a folder in the cache and runs the body, which writes there.

    Raises:
        BackboneError: If the folder cannot be made or written, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise _unwritable(folder, error.strerror or str(error)) from error


def check_room(folder: Path, size: int) -> None:
    """Refuses what is larger than the free space of the cache's disk, before it is downloaded or converted.

    Args:
        folder: Where it will be written; it need not exist yet.
        size: Its bytes.

    Raises:
        BackboneError: Naming what is needed and what is free.
    """
    if (shortage := space_shortage(folder, size)) is not None:
        raise _unwritable(folder, shortage)


def _unwritable(folder: Path, reason: str) -> BackboneError:
    return BackboneError(
        f"cannot write to the cache folder {folder}: {reason}. Free some space, or set MOKA_PL_CACHE (or "
        "backbone.cache_dir) to another folder"
    )
