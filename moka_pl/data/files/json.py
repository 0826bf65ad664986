"""JSON: a list of records, read item by item, or a record a line."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moka_pl.data.files.text import MAX_RECORD, lines, pieces, position, shown, too_long
from moka_pl.errors import DataError, printable

_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""The escape of half a character: two in the right order make one."""

_NEAR = 16
"""Characters before the end of a piece in which the cut may be what makes it malformed."""


def parse_json(text: str) -> Any:
    """Parses a text as JSON.

    Raises:
        DataError: It is malformed or nested too deeply, an integer has thousands of digits, an object has a
            key twice, or a text is not valid Unicode.
    """
    try:
        value = _DECODER.decode(text)
        _check_text(value, text)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"malformed JSON ({error})") from error
    return value


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a file with one JSON object a line, such as ``train.jsonl``."""
    for number, line in lines(path):
        if line.isspace():
            continue
        location = f"{shown(path)}, line {number}"
        try:
            value = parse_json(line)
        except DataError as error:
            hint = ". Every line must hold one complete object" if "malformed" in str(error) else ""
            if number == 1 and line.lstrip().startswith("["):
                hint += ". The file looks like one JSON list: name it .json instead of .jsonl"
            raise DataError(f"{location}: {error}{hint}") from error
        yield _record(value, location)


def json_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a file with one JSON list of objects; of a large file only a part is in memory at a time."""
    items = _items(path)
    # What is malformed further down in a small file is told before what its first records lack.
    yield from list(items) if path.stat().st_size < MAX_RECORD else items


def _items(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    source = _Source(path)
    first = source.skip()
    if first not in ("", "["):
        value = source.value(1)
        if source.skip():
            raise source.malformed(
                "Extra data", hint=". If every line holds one object, name the file .jsonl"
            )
        raise DataError(
            f"{shown(path)}: expected a list of objects, found {type(value).__name__} at the top level"
        )
    if not first:
        return
    number, mark = 0, ","
    source.index += 1
    if source.skip() == "]":
        mark = "]"
        source.index += 1
    while mark == ",":
        number += 1
        source.skip()
        yield _record(source.value(number), f"{shown(path)}, item {number}")
        mark = source.skip()
        if mark not in (",", "]") or not mark:
            raise source.malformed("Expecting ',' delimiter")
        source.index += 1
    if source.skip():
        raise source.malformed("Extra data")


class _Source:
    """The text of a file from the value that is read on, in pieces."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = 0
        self._text = ""
        self._line, self._column = 1, 1
        self._pieces = pieces(path)

    def skip(self) -> str:
        """Goes to the next character that is not white space, and returns it; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self.index)
            assert match is not None
            self.index = match.end()
            if self.index < len(self._text):
                return self._text[self.index]
            if not self._more():
                return ""

    def value(self, number: int) -> Any:
        """Reads the value that begins here, of the ``number``-th item."""
        while True:
            failure: DataError | None = None
            try:
                value, end = _DECODER.raw_decode(self._text, self.index)
                _check_text(value, self._text[self.index : end])
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR
                failure, value, end = self.malformed(error.msg, error.pos), None, len(self._text)
                if not cut:
                    raise failure from error
            except DataError as error:
                raise DataError(f"{shown(self.path)}, line {self._line_number}: {error}") from error
            except (ValueError, RecursionError) as error:  # they name no position
                where = f"the value begins in line {self._line_number}"
                raise DataError(f"{shown(self.path)}: malformed JSON ({error}; {where})") from error
            if end - self.index > MAX_RECORD:
                raise too_long(f"{shown(self.path)}, item {number}: the item")
            # What ends with the text may go on after it.
            if end == len(self._text):
                if self._more():
                    continue
                end = len(self._text)
            if failure is not None:
                raise failure
            self.index = end
            return value

    def malformed(self, reason: str, index: int | None = None, hint: str = "") -> DataError:
        """Returns the error of what stands at an index of the text, by default here."""
        index = self.index if index is None else index
        line, column = position(self._text, index, self._line, self._column)
        return DataError(f"{shown(self.path)}, line {line}: malformed JSON ({reason}, column {column}){hint}")

    @property
    def _line_number(self) -> int:
        return position(self._text, self.index, self._line, self._column)[0]

    def _more(self) -> bool:
        """Forgets what was read, and doubles the rest; returns whether there was more."""
        self._line, self._column = position(self._text, self.index, self._line, self._column)
        self._text, self.index = self._text[self.index :], 0
        parts, length = [self._text], len(self._text)
        wanted = max(1, 2 * length)
        for piece in self._pieces:
            parts.append(piece)
            length += len(piece)
            if length >= wanted:
                break
        self._text = "".join(parts)
        return len(parts) > 1


def _record(value: object, location: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise DataError(f"{location}: expected an object with named fields, found {type(value).__name__}")
    return location, value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise DataError(f"an object has the key {printable(name, 60)!r} twice. Keep one of them")
    return record


def _check_text(value: object, text: str) -> None:
    """Raises ``DataError`` for halves of characters in the strings of a value; its JSON is ``text``."""
    if _HALF.search(text) is None:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise DataError(f"a text has {half}, half of a character (a lone surrogate). Correct it") from error


_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder(object_pairs_hook=_object)
