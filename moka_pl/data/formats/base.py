"""What the formats share: how a record's format is told, and how its fields are taken out.

Errors here do not say where the record stands: whoever reads it puts its location before them.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from moka_pl.errors import DataError, printable

Record = Mapping[str, Any]
Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Format(Generic[Parsed]):
    """A format of records.

    Attributes:
        description: What messages call it, with the names of its fields.
        fields: The fields that the option ``columns`` may map.
        fits: Whether a record is in this format.
        parse: Takes a record of this format apart, or raises ``DataError``. Fields of the record that it does
            not read are named to the user.
    """

    description: str
    fields: tuple[str, ...]
    fits: Callable[[Record], bool]
    parse: Callable[[Record], Parsed]


class Fields(dict[str, Any]):
    """A record that knows which of its fields were read, so that the others can be named.

    Asking whether a field is there (``in``) does not read it, nor does ``has_value``.

    Attributes:
        ignored: What was left out on the way to this record, by name and number.
    """

    def __init__(self, record: Record, ignored: Mapping[str, int] | None = None) -> None:
        super().__init__(record)
        self.ignored = Counter(ignored or {})
        self._read: set[str] = set()

    def __getitem__(self, field: str) -> Any:
        self._read.add(field)
        return super().__getitem__(field)

    def get(self, field: str, default: Any = None) -> Any:
        """Reads a field, or returns the default."""
        self._read.add(field)
        return super().get(field, default)

    def forget(self) -> None:
        """Takes all fields for unread again."""
        self._read.clear()

    def left_out(self) -> Counter[str]:
        """Returns what was ignored on the way, and the fields with a value that nobody has read."""
        unread = (field for field in self if field not in self._read and has_value(self, field))
        return self.ignored + Counter(map(str, unread))


def ignored_in(record: Record) -> Counter[str]:
    """Returns the counts of what is left out on the way to a record, to be added to."""
    return record.ignored if isinstance(record, Fields) else Counter()


def has_value(record: Record, field: str) -> bool:
    """Returns whether a field holds something, which does not count as reading it."""
    return not is_empty(peek(record, field))


def peek(record: Record, field: str) -> Any:
    """Returns a field, or None without it, which does not count as reading it."""
    return dict.get(record, field) if isinstance(record, dict) else record.get(field)


def is_empty(value: object) -> bool:
    """Returns whether a value says nothing: Parquet fills absent fields with None, CSV has empty cells."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def from_json(value: object) -> object:
    """Returns what JSON text of a list or an object stands for; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


class MissingFieldError(DataError):
    """A record lacks a field, so that it may have been meant in another format."""


def parse_as(formats: Sequence[Format[Parsed]], record: Record) -> Parsed:
    """Parses a record in the first format that it fits.

    Raises:
        DataError: No format fits, or the record is malformed.
    """
    try:
        for format in formats:
            if format.fits(record):
                if isinstance(record, Fields):
                    record.forget()  # what telling the format has looked at
                return format.parse(record)
        raise MissingFieldError(f"no format matches these fields: {names(record)}")
    except MissingFieldError as error:
        known = "; ".join(format.description for format in formats)
        raise DataError(f"{error}. Expected one of: {known}. Map your columns with `columns`") from error


def require(record: Record, field: str, label: str = "") -> Any:
    """Returns a field of a record, or raises ``DataError``.

    Args:
        record: The record.
        field: Name of the field.
        label: What messages call it, if not by its name in quotes.
    """
    if field not in record:
        error = DataError if label else MissingFieldError
        raise error(f"field {label or repr(field)} is missing; found: {names(record)}")
    return record[field]


def require_text(record: Record, field: str) -> str:
    """Returns a field that must be text.

    Raises:
        DataError: The field is missing or holds something else.
    """
    value = require(record, field)
    if not isinstance(value, str):
        raise DataError(f"field {field!r} must be text, found {show(value)}")
    return value


def names(record: Record) -> str:
    """Returns the names of a record's fields, for messages."""
    fields = [printable(str(name), 60) for name in islice(record, _NAMED)]
    more = f" and {len(record) - _NAMED:,} more" if len(record) > _NAMED else ""
    one = len(fields) == 1 and any(mark in fields[0] for mark in _SEPARATORS)
    hint = " (one field: is its separator another one? Known are , ; tab and |)" if one else ""
    return f"{', '.join(fields) or 'nothing'}{more}{hint}"


def show(value: object) -> str:
    """Returns type and beginning of a value, for messages."""
    return f"{type(value).__name__} {printable(repr(value), 60)}"


def brief(value: object) -> str:
    """Returns a value as Python writes it, for messages; a long one is cut."""
    return printable(repr(value), 200)


_NAMED = 30
_SEPARATORS = ",;\t|:^~"
