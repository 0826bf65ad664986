"""What the formats share: how a record's format is told, and how its fields are taken out.

Errors here do not say where the record stands: whoever reads it puts its location before them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from moka_pl.errors import DataError

Record = Mapping[str, Any]
Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Format(Generic[Parsed]):
    """A format of records.

    Attributes:
        description: What messages call it, with the names of its fields.
        fields: The fields that the option ``columns`` may map.
        fits: Whether a record is in this format.
        parse: Takes a record of this format apart, or raises ``DataError``.
    """

    description: str
    fields: tuple[str, ...]
    fits: Callable[[Record], bool]
    parse: Callable[[Record], Parsed]


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


def require_text(record: Record, field: str, label: str = "") -> str:
    """Returns a field that must be text.

    Args:
        record: The record.
        field: Name of the field.
        label: What messages call the field, if not by its name.

    Raises:
        DataError: The field is missing or holds something else.
    """
    value = require(record, field, label)
    if not isinstance(value, str):
        raise DataError(f"field {label or repr(field)} must be text, found {show(value)}")
    return value


def names(record: Record) -> str:
    """Returns the names of a record's fields, for messages."""
    return ", ".join(map(str, record)) or "nothing"


def show(value: object) -> str:
    """Returns type and beginning of a value, for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
