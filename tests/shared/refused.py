"""Data files that are refused in one line."""

from pathlib import Path

import pytest

from moka_pl.data import DataError
from moka_pl.data.readers import stream


def refuse(path: Path, *parts: str) -> str:
    """Reads a file that must end in one short line with its name and these parts; returns the line."""
    with pytest.raises(DataError) as caught:
        list(stream(path))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    for part in (path.name, *parts):
        assert part in message
    return message
