"""CSV as spreadsheets write it: separators are detected, and empty columns left out."""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from moka_pl.data.files.text import MAX_RECORD, lines, shown, too_long
from moka_pl.errors import DataError, printable

SEPARATORS = ",;\t|"
"""What may stand between cells; the header has the most of it, and more commas where two are equally many."""

_SEP = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
"""Excel's first line that names the separator."""


def csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a file whose first row names the columns; rows are located by the line that they begin in.

    Rows of empty cells are read as such. Columns without a name must be empty, but for a first one, which is
    an index (as pandas writes it) and left out.
    """
    source = _Lines(path)
    separator = source.separator()
    reader = csv.reader(source, delimiter=separator, strict=True)
    named: dict[int, str] = {}
    columns: list[str] = []
    while (row := source.row(reader)) is not None:
        if not columns:
            columns = row
            named = _named(row, source.location)
            continue
        blank = not any(cell.strip() for cell in row)
        if not blank and (len(row) < len(columns) or any(cell.strip() for cell in row[len(columns) :])):
            names = printable(", ".join(columns), 300)
            raise DataError(
                f"{source.location}: {len(row)} cells, but the header names {len(columns)} columns ({names}; "
                f"the separator is {separator!r}). Quote cells that hold separators or line breaks"
            )
        for number, cell in enumerate(row[1 : len(columns)], start=2):
            if cell.strip() and number - 1 not in named:
                raise DataError(
                    f"{source.location}: cell {number} is not empty, but its column has no name. Name it in "
                    "the header"
                )
        if row:  # not an empty line
            yield source.location, {name: "" if blank else row[index] for index, name in named.items()}


class _Lines:
    """Lines for a csv reader, no more than a record at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: Iterator[tuple[int, str]] = lines(path, newline="")
        self._length = 0
        self._number = 0
        self._start = 1

    def __iter__(self) -> Iterator[str]:
        for number, line in self._lines:
            self._number = number
            self._length += len(line)
            if self._length > MAX_RECORD:
                raise too_long(f"{self.location}: the record (perhaps a quote is not closed)")
            yield line

    @property
    def location(self) -> str:
        """Where the latest row begins."""
        return f"{shown(self._path)}, line {self._start}"

    def separator(self) -> str:
        """Returns the separator that the first lines tell, and goes to the header."""
        separator = None
        for number, line in self._lines:
            if match := _SEP.fullmatch(line):
                separator = match[1]
            elif line.strip(f'{SEPARATORS}" \r\n'):
                self._lines = chain([(number, line)], self._lines)
                self._number = number - 1
                return separator or max(SEPARATORS, key=re.sub(r'"[^"]*"?', "", line).count)
        return ","

    def row(self, reader: Iterator[list[str]]) -> list[str] | None:
        """Returns the next row of the reader of these lines; None at the end."""
        self._start = self._number + 1
        self._length = 0
        # The module has one limit, for all of its readers: it is raised only while a row is read.
        limit = csv.field_size_limit(MAX_RECORD)
        try:
            return next(reader, None)
        except csv.Error as error:
            raise DataError(f"{self.location}: malformed CSV ({error})") from error
        finally:
            csv.field_size_limit(limit)


def _named(header: list[str], location: str) -> dict[int, str]:
    """Returns the columns that have names, by their indices."""
    named = {index: name for index, name in enumerate(header) if name.strip()}
    name, count = Counter(named.values()).most_common(1)[0]
    if count > 1:
        raise DataError(
            f"{location}: the header names {printable(name, 60)!r} {count} times. Rename or remove columns"
        )
    return named
