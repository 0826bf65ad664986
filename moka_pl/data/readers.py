"""Reads the records of one local file, each with its location, one after another.

``datasets`` has readers of its own, but they guess one type for every column, read ``NA`` as nothing, fill
absent fields with None and do not say which record is wrong. To read another kind of file, write its reader
in ``files/`` and name its suffix in ``READERS``.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moka_pl.data.files.csv import csv_rows
from moka_pl.data.files.json import json_lines, json_list
from moka_pl.data.files.parquet import parquet_rows
from moka_pl.data.files.text import COMPRESSIONS, MAX_RECORD, check_expansion, pieces, shown, too_long
from moka_pl.errors import DataError, one_line
from moka_pl.utils import LFS_POINTER, expanded

Located = tuple[str, dict[str, Any]]
"""A location such as ``"train.jsonl, line 7"`` and the record that stands there."""

READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".json": json_list,
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
}
"""How each kind of local file is read; text files may be compressed (``COMPRESSIONS``)."""

_OTHER_FILES = {
    b"PK\x03\x04": ("a zip or an Excel file", "Unpack it, or export the sheet as CSV (in Excel: CSV UTF-8)"),
    b"\xd0\xcf\x11\xe0": ("an old Excel file", "Export the sheet as CSV (in Excel: CSV UTF-8)"),
    b"\x1f\x8b": ("compressed", "Name it .gz after its own suffix, as in .jsonl.gz"),
    b"BZh": ("compressed", "Name it .bz2 after its own suffix, as in .jsonl.bz2"),
    b"\xfd7zXZ": ("compressed", "Name it .xz after its own suffix, as in .jsonl.xz"),
    b"\x28\xb5\x2f\xfd": ("compressed", "Name it .zst after its own suffix, as in .jsonl.zst"),
    b"PAR1": ("a Parquet file", "Name it .parquet"),
    b"ARROW1": ("an Arrow file", "Write it as Parquet"),
    b"%PDF": ("a PDF file", "Write its text to another file"),
    LFS_POINTER: ("a pointer of Git LFS, not the data", "Run `git lfs pull`"),
}
"""What files may be whatever their names say, by their first bytes, and what to do then."""


_PART = MAX_RECORD // 4
"""Characters of the texts that a longer text file is cut into: tokenising takes 300 times their memory."""


@contextmanager
def located(location: str) -> Iterator[None]:
    """Runs the body, and puts the location of what it reads before the message of its ``DataError``.

    Any other exception becomes one: whatever a user's record does to us, the user learns which one it was.
    """
    try:
        yield
    except DataError as error:
        text = one_line(error) if "\n" in str(error) else str(error)
        raise DataError(f"{location}: {text}") from error
    except Exception as error:
        raise DataError(f"{location}: the record cannot be used ({described(error)})") from error


def described(error: Exception) -> str:
    """Returns type and message of an error that nobody has foreseen."""
    return f"{type(error).__name__}: {one_line(error)}"


def stream(path: Path) -> Iterator[Located]:
    """Reads the records of a file whose suffix is in ``READERS``.

    Locations count from 1: lines for ``.jsonl`` and ``.csv``, items for ``.json``, rows for ``.parquet``.

    Raises:
        DataError: The file is missing, empty, of an unknown kind, not text, or malformed. Whatever a reader
            raises becomes one.
    """
    check_source(path)
    suffix = suffix_of(path)
    location = ""
    try:
        check_expansion(path)
        for location, record in READERS[suffix or ""](path):
            yield location, record
    except DataError:
        raise
    except Exception as error:
        kind = "Parquet" if suffix == ".parquet" else suffix
        after = f" after {location.removeprefix(f'{shown(path)}, ')}" if location else ""
        raise DataError(
            f"{shown(path)}: not a readable {kind} file{after} ({described(error)}). "
            "Write it again, and check the disk and its permissions"
        ) from error
    if not location:
        raise DataError(f"{shown(path)} has no records. Give a file with at least one record")


def check_source(path: Path) -> None:
    """Raises ``DataError`` for a path that is no file of a known kind, without reading it."""
    check_file(path)
    try:
        _check_kind(path, suffix_of(path))
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read ({one_line(error)})") from error


def suffix_of(path: Path) -> str | None:
    """Returns the suffix in ``READERS`` that says how a file is read; None for files that cannot be read."""
    name = path.name.lower()
    known = [suffix for suffix in READERS if name.endswith(suffix)]
    if not known and path.suffix.lower() in COMPRESSIONS:
        bare = name.removesuffix(path.suffix.lower())
        known = [suffix for suffix in READERS if bare.endswith(suffix) and suffix != ".parquet"]
    return max(known, key=len, default=None)


def path_exists(source: str | Path) -> bool:
    """Returns whether there is something at a local path, be it a link to nowhere."""
    return os.path.lexists(expanded(source))


def is_folder(path: Path) -> bool:
    """Returns whether a path is a folder; one that the system cannot look at is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def check_file(path: Path) -> None:
    """Raises ``DataError`` for a path that is not a file."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        what = f"{shown(path)} does not exist (looked at {shown(path.absolute())})"
        if path.is_symlink():
            what = f"{shown(path)} is a link to {shown(path.readlink())}, which does not exist"
        hint = (
            ". Patterns are not expanded: give a list of files, or their folder" if "*" in str(path) else ""
        )
        if re.match(r"[a-z][a-z0-9+]+:/", str(path)):  # pathlib leaves one slash of an address
            hint = ". Addresses are not read: download the file and give its path"
        raise DataError(f"{what}. Check the spelling of the path{hint}") from error
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read ({error.strerror}). Give another path") from error
    if stat.S_ISDIR(mode):
        raise DataError(f"{shown(path)} is a folder. Give a file, or a list of files")
    if not stat.S_ISREG(mode):
        raise DataError(f"{shown(path)} is a pipe or a device. Write its data to a file and give that")


def read_texts(path: Path) -> list[str]:
    """Reads a text file: one text, or several where it is longer than a record may be, cut at line breaks.

    Raises:
        DataError: The file is missing, has a line longer than a record may be, is not text, or has none.
    """
    check_file(path)
    texts: list[str] = []
    parts, length = [], 0
    try:
        _check_kind(path, path.suffix)
        check_expansion(path)
        for piece in pieces(path, newline=""):
            parts.append(piece)
            length += len(piece)
            if length > MAX_RECORD:
                *whole, rest = _cut("".join(parts), path)
                texts += whole
                parts, length = [rest], len(rest)
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read ({one_line(error)})") from error
    texts = [text for text in (*texts, "".join(parts)) if text.strip()]
    if not texts:
        raise DataError(f"{shown(path)} has no text. Give another file")
    return texts


def _cut(text: str, path: Path) -> list[str]:
    """Cuts a text after line breaks into parts of at most ``_PART`` characters, or of one longer line."""
    parts = []
    while len(text) > _PART:
        end = text.rfind("\n", 0, _PART) + 1 or text.find("\n", _PART) + 1
        if not end and len(text) > MAX_RECORD:
            raise too_long(f"{shown(path)}: a line")
        if not end:
            break
        parts.append(text[:end])
        text = text[end:]
    return [*parts, text]


def _check_kind(path: Path, suffix: str | None) -> None:
    """Raises ``DataError`` for an empty file, and for one that is another kind of file than it should be."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    other = next((what for start, what in _OTHER_FILES.items() if head.startswith(start)), None)
    expected = suffix == ".parquet" or path.suffix.lower() in COMPRESSIONS
    if suffix is None:
        kind, remedy = other or ("", f"Convert it to one of {', '.join(READERS)}")
        kind = f" and is {kind}" if kind else ""
        raise DataError(f"{shown(path)} has the unknown file type {path.suffix!r}{kind}. {remedy}")
    if not head:
        raise DataError(f"{shown(path)} is empty (0 bytes). Give a file with at least one record")
    if other is not None and not (expected and head[:7] != b"version"):
        kind, remedy = other
        raise DataError(f"{shown(path)} is {kind}, whatever its name says. {remedy}")


_HEAD = max(map(len, _OTHER_FILES))
