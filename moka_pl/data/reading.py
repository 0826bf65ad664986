"""Turns a local file or a hub dataset into a parsed, disk-cached ``datasets.Dataset``."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from moka_pl.data.cache import cached
from moka_pl.data.catalog import CHOICE_TASKS, CORPORA
from moka_pl.data.encoding.report import BLANK, merged, placed
from moka_pl.data.files.text import shown
from moka_pl.data.formats.base import Fields, Record, has_value, names
from moka_pl.data.readers import (
    READERS,
    Located,
    check_source,
    described,
    located,
    path_exists,
    stream,
    suffix_of,
)
from moka_pl.data.sources import Shard
from moka_pl.errors import DataError, one_line
from moka_pl.hub import cache_if_unreachable, unasked
from moka_pl.utils import expanded

if TYPE_CHECKING:
    from datasets import Dataset, Features

READING_VERSION = 7
"""Raise it when parsed rows come out differently: caches of older versions are then left alone."""

ARROW = (".parquet",)
"""Files in which the inner fields that a record does not have are there, and None, as they are on the hub."""

SILENT_BYTES = 20_000_000
"""Files below this size (bytes) are read without a progress bar."""

SILENT_ROWS = 50_000
"""The same for the rows of a hub dataset."""

Parse = Callable[[Record, str], dict[str, Any]]
"""``parse(record, context)`` returns the row to keep, or raises ``DataError``."""

Gather = Callable[[Iterable[Located]], Iterator[Located]]
"""Makes records of several ones (message trees) before they are parsed."""

Columns = Mapping[str, str | list[str]]
"""Field of a format to the column that holds it; several columns make a list."""


def parse_columns(columns: Columns | None, known: Sequence[str]) -> Columns:
    """Returns the option ``columns`` of the fields ``known``; empty keeps the names in the data.

    Raises:
        DataError: A field is unknown, or is mapped to something other than names.
    """
    for field, column in (columns or {}).items():
        if field not in known:
            raise DataError(
                f"`columns` has an unknown field {field!r}. Write field: column, with one of the fields "
                f"{', '.join(known)}"
            )
        chosen = column if isinstance(column, list) else [column]
        if not chosen or not all(isinstance(name, str) and name for name in chosen):
            raise DataError(f"`columns` must map {field!r} to the name of a column, found {column!r}")
    return columns or {}


def parse_record(parse: Parse, record: dict[str, Any], location: str, context: str = "") -> dict[str, Any]:
    """Parses one record, and puts its location into the row, or before the message of a ``DataError``.

    The row's ``ignored`` is the JSON of the fields that were not used, each with how often, or empty.

    Args:
        parse: What parses it.
        record: The record under the fields' names.
        location: Where it stands.
        context: Handed to ``parse``.
    """
    fields = record if isinstance(record, Fields) else Fields(record)
    with located(location):
        row = parse(fields, context)
    ignored = fields.left_out()
    return {"location": location, **row, "ignored": merged(ignored)}


def rename(record: dict[str, Any], columns: Columns) -> Fields:
    """Returns the record under the fields' names; with a mapping, only the columns it names are kept.

    The others count as ignored.

    Raises:
        DataError: A column is missing.
    """
    renamed: dict[str, Any] = {}
    used: set[str] = set()
    for field, column in columns.items():
        for name in [column] if isinstance(column, str) else column:
            if name not in record:
                raise DataError(
                    f"column {name!r} (for the field {field!r} in `columns`) is missing; found: "
                    f"{names(record)}. Correct `columns`"
                )
            used.add(name)
        renamed[field] = record[column] if isinstance(column, str) else [record[name] for name in column]
    others = (name for name in record if name not in used and has_value(record, name))
    return Fields(renamed, Counter(map(str, others))) if columns else Fields(record)


@contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Runs the body with the progress bars of ``datasets`` as the user has set them, or silenced."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def is_local(source: str | Path) -> bool:
    """Returns whether a source is a local file or folder rather than a hub dataset id."""
    path = expanded(source)
    return (
        isinstance(source, Path)
        or path_exists(source)
        or path.is_absolute()
        or "*" in path.name
        or suffix_of(path) is not None
    )


def read_rows(
    shard: Shard,
    parse: Parse,
    features: "Features",
    *,
    columns: Columns | None = None,
    gather: Gather | None = None,
    skip_blank: bool = True,
) -> "Dataset":
    """Reads and parses every record of a shard, in its order.

    The result is memory-mapped from the cache folder of ``datasets`` (``HF_DATASETS_CACHE``); a second call
    for an unchanged file reads nothing but this cache. A file counts as unchanged while its path, its times
    of change and its size are.

    Args:
        shard: A local file, or a split of a hub dataset.
        parse: A module-level function that turns a record into a row with the columns of ``features``, all
            but ``location``; it is given the shard's context, too.
        features: Columns of the result, which also has ``ignored`` (see ``parse_record``).
        columns: Names of the columns, by field.
        gather: A module-level function, or a ``partial`` of one, that all records pass through first.
        skip_blank: Leave out records of which no field says anything, and count them in ``ignored``.

    Raises:
        DataError: The shard cannot be read, or ``parse`` refused a record.
    """
    from datasets import Dataset, Features, Value
    from datasets.fingerprint import Hasher

    # `datasets` names the cache after a hash of gen_kwargs; functions of a module are hashed by their name.
    arguments: dict[str, Any] = {"parse": parse, "context": shard.context, "columns": columns or {}}
    arguments |= {"gather": gather, "version": READING_VERSION, "skip_blank": skip_blank}
    if is_local(shard.source):
        path = expanded(shard.source)
        check_source(path)
        state = path.stat()
        label = shown(path)
        arguments |= {"name": label, "records": partial(stream, path)}
        # The time of the last change, which nobody can set, tells files that only look the same.
        times = (state.st_mtime_ns, state.st_ctime_ns)
        arguments |= {"state": (str(path.absolute()), *times, state.st_size)}
        if suffix_of(path) in ARROW:
            arguments |= {"records": partial(_without_fill, arguments["records"])}
        show = state.st_size >= SILENT_BYTES
    else:
        rows = load_hub(str(shard.source), shard.split, shard.options)
        config = f"{shard.options['name']}, " if "name" in shard.options else ""
        label = f"{shard.source} ({config}{shard.split})"
        arguments |= {"name": label, "records": partial(_without_fill, partial(_hub_records, label, rows))}
        show = len(rows) >= SILENT_ROWS
    columns = Features({**features, "ignored": Value("large_string")})

    def build(base: Path, fresh: bool) -> Dataset:
        return Dataset.from_generator(_rows, features=columns, cache_dir=str(base), gen_kwargs=arguments)

    with progress_bars(show):
        return cached(build, "read", Hasher.hash(arguments), label)


def load_hub(name: str, split: str, options: Mapping[str, Any]) -> Any:
    """Calls ``datasets.load_dataset``.

    Args:
        name: Id of the dataset.
        split: Its split.
        options: What else ``datasets.load_dataset`` is given.

    Raises:
        DataError: The dataset cannot be loaded, whatever the reason: name, split, rights or network.
    """
    import datasets

    if name in _reader_names():
        raise DataError(
            f"{name!r}: no such file or dataset (`datasets` has a reader of that name, but no data). Give "
            f"the path of a {', '.join(READERS)} file, or a hub id"
        )
    others = dict(options)
    config = [others.pop("name")] if "name" in others else []
    with cache_if_unreachable() as reason:
        try:
            return datasets.load_dataset(name, *config, split=split, **others)
        # Whatever goes wrong in there (network, rights, unknown names), the user needs the same advice.
        except Exception as error:
            raise _hub_error(name, split, error, reason) from error


def _hub_error(name: str, split: str, error: Exception, reason: Exception | None) -> DataError:
    """Returns what a failed load says; ``datasets`` raises a ConnectionError where its cache has nothing."""
    known = f" (known names: {', '.join([*CORPORA, *CHOICE_TASKS])})" if "/" not in name else ""
    instead = f"or download the data and give the path of a {', '.join(READERS)} file"
    if reason is None or not isinstance(error, ConnectionError):
        return DataError(
            f"{name!r} is not a local file and cannot be loaded from the hub (split {split!r}): "
            f"{one_line(error).rstrip('.')}. Check the spelling{known} and the network, {instead}"
        )
    why, remedy = unasked(reason)
    return DataError(
        f"{name!r} is neither a local file nor in the cache of `datasets` (split {split!r}), and {why}. "
        f"Check the spelling{known}, {remedy}, {instead}"
    )


def _reader_names() -> list[str]:
    """Returns the names that ``datasets`` takes for its own readers: csv, json, text, ..."""
    from datasets import packaged_modules

    return [module.name for module in iter_modules(packaged_modules.__path__)]


def _rows(
    name: str,
    records: Callable[[], Iterator[Located]],
    parse: Parse,
    context: str,
    columns: Columns,
    gather: Gather | None,
    skip_blank: bool,
    **hashed: Any,
) -> Iterator[dict[str, Any]]:
    """Yields parsed rows; the last one's ``ignored`` tells of the blank ones. ``hashed`` is only hashed."""
    blank: list[str] = []
    row = None
    try:
        filled = _filled(records(), blank) if skip_blank else records()
        renamed = _renamed(filled, columns)
        for location, record in renamed if gather is None else gather(renamed):
            if row is not None:
                yield row
            row = parse_record(parse, record, location, context)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name}: the records cannot be used ({described(error)})") from error
    if row is None:
        raise DataError(f"{name} has only rows of empty cells. Give a file with at least one record")
    if blank:
        row["ignored"] = merged(row["ignored"], {placed(BLANK, [f"from {blank[0]} on"]): len(blank)})
    yield row


def is_blank(record: Record) -> bool:
    """Returns whether a record has fields, but none of them says anything, as rows below a sheet's data."""
    values = record.values()
    return bool(record) and all(
        value is None or value != value or (isinstance(value, str) and not value.strip()) for value in values
    )


def _filled(records: Iterable[Located], blank: list[str]) -> Iterator[Located]:
    """Yields the records that say something, and adds the locations of the others to ``blank``."""
    for location, record in records:
        if is_blank(record):
            blank.append(location)
        else:
            yield location, record


def _renamed(records: Iterable[Located], columns: Columns) -> Iterator[Located]:
    for location, record in records:
        with located(location):
            yield location, rename(record, columns)


def _without_fill(records: Callable[[], Iterator[Located]]) -> Iterator[Located]:
    for location, record in records():
        yield location, without_fill(record)


def without_fill(record: Record) -> dict[str, Any]:
    """Returns a record of an Arrow table without what fills the inner fields that it does not have."""
    return {name: _stripped(value) for name, value in record.items()}


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stripped(item) for name, item in value.items() if item is not None}
    return [_stripped(item) for item in value] if isinstance(value, list) else value


def _hub_records(name: str, rows: "Dataset") -> Iterator[Located]:
    for number, record in enumerate(rows, start=1):
        yield f"{name}, row {number}", record
    if len(rows) == 0:
        raise DataError(f"{name} has no records. Give another split")
