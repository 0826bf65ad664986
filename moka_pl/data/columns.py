"""Own column names: which column of the data holds which field of a form."""

from collections.abc import Iterable, Mapping
from typing import Any

from moka_pl.errors_part import DataError

ColumnNames = Mapping[str, str | list[str]]
"""Field of a form to the column that holds it; several columns make a list."""

Columns = tuple[tuple[str, str | tuple[str, ...]], ...]
"""The same, fit to be hashed."""


def check_columns(columns: ColumnNames | None, known: Iterable[str]) -> Columns:
    """Check the option `columns`.

    Args:
        columns: As the user gave it; None and `{}` keep the names of the data.
        known: Fields that may be named.

    Returns:
        The mapping as a tuple.

    Raises:
        DataError: A field is not known, or a column is no name.
    """
    known = list(known)
    checked: list[tuple[str, str | tuple[str, ...]]] = []
    for field, column in (columns or {}).items():
        if field not in known:
            raise DataError(
                f"`columns` maps the field {field!r}, which no form has. Write it as field: column, with a "
                f"field out of {', '.join(known)}."
            )
        names = column if isinstance(column, list) else [column]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise DataError(f"`columns` must map {field!r} to the name of a column, found {column!r}.")
        checked.append((field, tuple(column) if isinstance(column, list) else column))
    return tuple(checked)


def rename(record: dict[str, Any], columns: Columns, where: str) -> dict[str, Any]:
    """The record under the fields' names; with a mapping, only the columns it names are kept.

    Raises:
        DataError: A column is missing.
    """
    if not columns:
        return record
    out: dict[str, Any] = {}
    for field, column in columns:
        names = (column,) if isinstance(column, str) else column
        for name in names:
            if name not in record:
                found = ", ".join(map(str, record)) or "nothing"
                raise DataError(
                    f"{where}: column {name!r} (of the field {field!r} in `columns`) is missing; found: "
                    f"{found}. Correct `columns`."
                )
        values = [record[name] for name in names]
        out[field] = values[0] if isinstance(column, str) else values
    return out
