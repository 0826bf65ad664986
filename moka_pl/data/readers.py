"""Read the records of one local file, each with its position, one after another."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moka_pl.errors import DataError

Located = tuple[str, dict[str, Any]]
"""A position such as `"train.jsonl, line 7"` and the record that stands there."""


def stream(path: Path) -> Iterator[Located]:
    """The records of a `.json` (a list of objects), `.jsonl`, `.csv` or `.parquet` file.

    Args:
        path: A local file. Its suffix says how it is read.

    Yields:
        Pairs of a position and a record. Positions count from 1: lines for `.jsonl` and `.csv`, items for
        `.json`, rows for `.parquet`.

    Raises:
        DataError: The file is missing, empty, of an unknown kind, not UTF-8, or malformed.
    """
    reader = _reader(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes). Give a file with at least one record.")
    empty = True
    for located in reader(path):
        empty = False
        yield located
    if empty:
        raise DataError(f"{path} holds no records. Give a file with at least one record.")


def _reader(path: Path) -> Callable[[Path], Iterator[Located]]:
    if path.is_dir():
        raise DataError(f"{path} is a folder. Give a file, or a list of files.")
    if not path.is_file():
        raise DataError(
            f"{path} does not exist (looked at {path.absolute()}). Check the spelling of the path."
        )
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} ends in {path.suffix!r}; known kinds are {', '.join(_READERS)}. Convert the file."
        )
    return reader


def _decode(path: Path, line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: byte 0x{line[error.start]:02x} at column {error.start + 1} is not "
            "UTF-8. Save the file in the UTF-8 encoding."
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, _decode(path, line, number)


def _record(value: object, location: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{location}: expected an object with named fields, found {type(value).__name__}.")
    return value


def _json_lines(path: Path) -> Iterator[Located]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        location = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            hint = ""
            if number == 1 and line.lstrip().startswith("["):
                hint = " The file looks like one JSON list: name it .json instead of .jsonl."
            raise DataError(
                f"{location}: malformed JSON ({error}). Every line must hold one complete object.{hint}"
            ) from error
        yield location, _record(value, location)


def _json_list(path: Path) -> Iterator[Located]:
    # Line by line, so that a wrong byte is reported with its line.
    text = "".join(line for _, line in _lines(path))
    if not text.strip():
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg == "Extra data":
            hint = " If every line holds one object, name the file .jsonl."
        raise DataError(
            f"{path}, line {error.lineno}: malformed JSON ({error.msg}, column {error.colno}).{hint}"
        ) from error
    except RecursionError as error:  # it names no position
        raise DataError(f"{path}: malformed JSON ({error}).") from error
    if not isinstance(values, list):
        raise DataError(
            f"{path}: expected a list of objects, found {type(values).__name__} at the top level."
        )
    for number, value in enumerate(values, start=1):
        location = f"{path}, item {number}"
        yield location, _record(value, location)


def _csv(path: Path) -> Iterator[Located]:
    reader = csv.DictReader((line for _, line in _lines(path)), strict=True)
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
                cells = len(columns) + surplus - missing
                raise DataError(
                    f"{location}: {cells} cells, but the header names {len(columns)} columns "
                    f"({', '.join(columns)}). Quote cells that hold commas or line breaks."
                )
            yield location, dict(row)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: malformed CSV ({error}).") from error


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}). Write it again.") from error


_READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".json": _json_list,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
SUFFIXES = tuple(_READERS)
"""The kinds of local files that can be read."""
