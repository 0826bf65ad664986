"""Turn a local file or a hub data set into a checked, disk-cached `datasets.Dataset`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.data.catalog import CHOICE_TASKS, CORPORA
from moka_pl.data.readers import SUFFIXES, Located, stream
from moka_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, Features


# Own column names: which column of the data holds which field of a form.


ColumnNames = Mapping[str, str | list[str]]
"""Field of a form to the column that holds it; several columns make a list."""

Columns = tuple[tuple[str, str | tuple[str, ...]], ...]
"""The same, fit to be hashed."""


def parse_columns(columns: ColumnNames | None, known: Iterable[str]) -> Columns:
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


def rename(record: dict[str, Any], columns: Columns, location: str) -> dict[str, Any]:
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
                    f"{location}: column {name!r} (of the field {field!r} in `columns`) is missing; found: "
                    f"{found}. Correct `columns`."
                )
        values = [record[name] for name in names]
        out[field] = values[0] if isinstance(column, str) else values
    return out


# Progress bars only where there is something to wait for.


@contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Run the body with or without the progress bars of `datasets`, and leave the user's setting as it was.

    Args:
        show: False silences the bars; True leaves them as the user has set them.
    """
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# Turn a local file or a hub data set into a checked, disk-cached `datasets.Dataset`.


READING_VERSION = 2
"""Raise it when checked rows come out differently: caches of older versions are then left alone."""

QUIET_BYTES = 20_000_000
"""Files below this size (bytes) are read without a progress bar."""

Check = Callable[[dict[str, Any], str, str], dict[str, Any]]
"""`parse(record, location, context)` returns the row to keep or raises DataError naming ``location``."""

Gather = Callable[[Iterable[Located]], Iterator[Located]]
"""Makes records of several ones (message trees) before they are checked."""


def is_local(source: str | Path) -> bool:
    """Whether `source` means a local file or folder rather than the id of a hub data set."""
    path = Path(source).expanduser()
    return isinstance(source, Path) or path.exists() or path.is_absolute() or path.suffix.lower() in SUFFIXES


def read_rows(
    source: str | Path,
    check: Check,
    features: "Features",
    *,
    context: str = "",
    split: str = "train",
    options: Mapping[str, Any] | None = None,
    columns: Columns = (),
    gather: Gather | None = None,
) -> "Dataset":
    """Read and check every record of `source`.

    The result is memory-mapped from the cache folder of `datasets` (`HF_DATASETS_CACHE`); a second call for
    an unchanged file reads nothing but this cache. A file counts as unchanged while its path, its
    modification time and its size are.

    Args:
        source: A local `.json`, `.jsonl`, `.csv` or `.parquet` file, or a hub data set id.
        check: A module-level function that turns a record into a row with the columns of `features`.
        features: Columns of the result.
        context: Handed to `check`, for what a record alone does not say (its task, for instance).
        split: Which split of a hub data set; ignored for files.
        options: What else `datasets.load_dataset` is given for a hub data set (`name`, `revision`, ...).
        columns: Own names of the columns, by field.
        gather: A module-level function, or a `partial` of one, that all records pass through first.

    Returns:
        The rows, in the order of the source.

    Raises:
        DataError: The source cannot be read, or `check` refused a record.
    """
    how = {"check": check, "context": context, "columns": columns, "gather": gather}
    if is_local(source):
        return _read_file(Path(source).expanduser(), features, how)
    return _read_hub(str(source), features, how, split, options or {})


def load_hub(name: str, split: str, options: Mapping[str, Any]) -> Any:
    """`datasets.load_dataset`, with every failure told in one message.

    Raises:
        DataError: The data set, the split or the network is not there.
    """
    import datasets

    others = dict(options)
    config = [others.pop("name")] if "name" in others else []
    try:
        return datasets.load_dataset(name, *config, split=split, **others)
    # Whatever goes wrong in there (network, rights, unknown names), the user needs the same advice.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        names = f" (known names: {', '.join([*CORPORA, *CHOICE_TASKS])})" if "/" not in name else ""
        raise DataError(
            f"{name!r} is neither a local file nor a data set that could be loaded from the hub "
            f"(split {split!r}): {reason}. Check the spelling{names} and the network, or download the data "
            f"and give the path of a {', '.join(SUFFIXES)} file."
        ) from error


def _read_file(path: Path, features: "Features", how: dict[str, Any]) -> "Dataset":
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        next(stream(path))  # raises the message that fits
    stat = path.stat()
    key = {"path": str(path), "at": str(path.absolute()), "modified": stat.st_mtime_ns, "size": stat.st_size}
    return _cached(_file_rows, key, features, how, show=stat.st_size >= QUIET_BYTES)


def _read_hub(
    name: str, features: "Features", how: dict[str, Any], split: str, options: Mapping[str, Any]
) -> "Dataset":
    raw = load_hub(name, split, options)
    config = f"{options['name']}, " if "name" in options else ""
    key = {"name": f"{name} ({config}{split})", "rows": raw}
    return _cached(_hub_rows, key, features, how, show=len(raw) >= 50_000)


def _cached(
    located: Callable[..., Iterator[Located]],
    key: dict[str, Any],
    features: "Features",
    how: dict[str, Any],
    *,
    show: bool,
) -> "Dataset":
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    # `datasets` names the cache after a hash of gen_kwargs; functions of a module are hashed by their name.
    arguments = {"located": located, "key": key, "version": READING_VERSION, **how}
    try:
        with progress_bars(show):
            return Dataset.from_generator(_checked, features=features, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DataError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


def _checked(
    located: Callable[..., Iterator[Located]],
    key: dict[str, Any],
    version: int,
    check: Check,
    context: str,
    columns: Columns,
    gather: Gather | None,
) -> Iterator[dict[str, Any]]:
    del version  # only there to be hashed
    yield from parse_records(located(**key), check, context, columns, gather)


def parse_records(
    located: Iterable[Located], check: Check, context: str, columns: Columns, gather: Gather | None
) -> Iterator[dict[str, Any]]:
    """Rename the columns of records, gather them, and check them one after another."""
    named = ((location, rename(record, columns, location)) for location, record in located)
    for location, record in gather(named) if gather is not None else named:
        yield check(record, location, context)


def _file_rows(path: str, at: str, modified: int, size: int) -> Iterator[Located]:
    del at, modified, size  # only there to be hashed
    return stream(Path(path))


def _hub_rows(name: str, rows: "Dataset") -> Iterator[Located]:
    for number, record in enumerate(rows, start=1):
        yield f"{name}, row {number}", record
    if len(rows) == 0:
        raise DataError(f"{name} holds no records. Give another split.")
