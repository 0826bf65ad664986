"""Reads the records of one local file, each with its location, one after another.

``datasets`` has readers of its own, but they guess one type for every column, read ``NA`` as nothing, fill
absent fields with None and do not say which record is wrong. To read another kind of file, write its reader
here and name its suffix in ``READERS``.
"""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moka_pl.errors import DataError

Located = tuple[str, dict[str, Any]]
"""A location such as ``"train.jsonl, line 7"`` and the record that stands there."""


@contextmanager
def located(location: str) -> Iterator[None]:
    """Runs the body, and puts the location of what it reads before the message of its ``DataError``."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{location}: {error}") from error


def stream(path: Path) -> Iterator[Located]:
    """Reads the records of a file whose suffix is in ``READERS``.

    Locations count from 1: lines for ``.jsonl`` and ``.csv``, items for ``.json``, rows for ``.parquet``.

    Raises:
        DataError: The file is missing, empty, of an unknown kind, not UTF-8, or malformed.
    """
    check_file(path)
    suffix = suffix_of(path)
    if suffix is None:
        raise DataError(
            f"{path} has the unknown file type {path.suffix!r}. Convert it to one of {', '.join(READERS)}"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes). Give a file with at least one record")
    empty = True
    for record in READERS[suffix](path):
        empty = False
        yield record
    if empty:
        raise DataError(f"{path} has no records. Give a file with at least one record")


def suffix_of(path: Path) -> str | None:
    """Returns the suffix that says how a file is read; None for files that cannot be read."""
    name = path.name.lower()
    return max((suffix for suffix in READERS if name.endswith(suffix)), key=len, default=None)


def check_file(path: Path) -> None:
    """Raises ``DataError`` for a path that is not a file."""
    if path.is_dir():
        raise DataError(f"{path} is a folder. Give a file, or a list of files")
    if not path.is_file():
        raise DataError(
            f"{path} does not exist (looked at {path.absolute()}). Check the spelling of the path"
        )


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Reads the lines of a file, each with its number from 1 and its line break.

    Raises:
        DataError: The file is not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: byte 0x{line[error.start]:02x} at column {error.start + 1} is "
                    "not UTF-8. Save the file in the UTF-8 encoding"
                ) from error


def _record(value: object, location: str) -> Located:
    if not isinstance(value, dict):
        raise DataError(f"{location}: expected an object with named fields, found {type(value).__name__}")
    return location, value


def _json_lines(path: Path) -> Iterator[Located]:
    for number, line in lines(path):
        if not line.strip():
            continue
        location = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            hint = ""
            if number == 1 and line.lstrip().startswith("["):
                hint = ". The file looks like one JSON list: name it .json instead of .jsonl"
            raise DataError(
                f"{location}: malformed JSON ({error}). Every line must hold one complete object{hint}"
            ) from error
        yield _record(value, location)


def _json_list(path: Path) -> Iterator[Located]:
    # Line by line, so that a wrong byte is reported with its line.
    text = "".join(line for _, line in lines(path))
    if not text.strip():
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        hint = ". If every line holds one object, name the file .jsonl" if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}, line {error.lineno}: malformed JSON ({error.msg}, column {error.colno}){hint}"
        ) from error
    except RecursionError as error:  # it names no position
        raise DataError(f"{path}: malformed JSON ({error})") from error
    if not isinstance(values, list):
        raise DataError(f"{path}: expected a list of objects, found {type(values).__name__} at the top level")
    for number, value in enumerate(values, start=1):
        yield _record(value, f"{path}, item {number}")


def _csv(path: Path) -> Iterator[Located]:
    reader = csv.DictReader((line for _, line in lines(path)), strict=True)
    start = 1
    try:
        columns = reader.fieldnames or []
        start = reader.line_num + 1
        for row in reader:
            location = f"{path}, line {start}"
            # DictReader files surplus cells under None and fills missing ones with None.
            surplus = len(row.get(None, ()))
            missing = sum(value is None for value in row.values())
            if surplus or missing:
                raise DataError(
                    f"{location}: {len(columns) + surplus - missing} cells, but the header names "
                    f"{len(columns)} columns ({', '.join(columns)}). Quote cells that hold commas or line "
                    "breaks"
                )
            yield location, dict(row)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: malformed CSV ({error})") from error


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}). Write it again") from error


READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".json": _json_list,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""How each kind of local file is read."""
