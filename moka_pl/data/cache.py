"""Rows in the cache of ``datasets`` on disk: what is damaged there is built again, what fails is one line.

Beside every file of ours stands its seal: its size, its times and a hash of its content. A file that still
has its size and times is taken as it is; any other is hashed, and built again unless it has its content.
A run asks for the same rows several times. Those asked for last stay open while their files stay as they are.
"""

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.errors import DataError, one_line
from moka_pl.utils import warn

if TYPE_CHECKING:
    from datasets import Dataset

_MOST_OPEN = 32
"""Datasets of which this process remembers that they are open: maps of their files, no copies."""

_open: "OrderedDict[Path, tuple[Dataset, dict[Path, list[int]]]]" = OrderedDict()
"""Rows by their path, with the states of their files; those asked for last stand at the end."""


def cache_folder() -> Path:
    """Returns the folder of all our rows, in the cache of ``datasets`` (``HF_DATASETS_CACHE``)."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE).absolute() / "moka_pl"


def cached(build: Callable[[Path, bool], "Dataset"], kind: str, key: str, label: str) -> "Dataset":
    """Returns rows that are built once, and again where their files are damaged.

    Args:
        build: Builds the rows below a path, or takes what is there; given True, it takes nothing.
        kind: Name of a folder for rows of one kind.
        key: Identifies the rows.
        label: What they are called in messages.

    Raises:
        DataError: The rows cannot be built, or the cache cannot be written.
    """
    from filelock import FileLock

    base = cache_folder() / kind / key
    if (rows := _still_open(base)) is not None:
        return rows
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{base}.lock"):
            rows = _cached(build, base, label)
            if rows.cache_files:  # else they are in memory, and take it
                _open[base] = rows, {file: _state(file) for file in _all_files(base)}
            while len(_open) > _MOST_OPEN:
                _open.popitem(last=False)
            return rows
    except DataError:
        raise
    except Exception as error:
        raise _one_line(error, label) from error


def _still_open(base: Path) -> "Dataset | None":
    """Returns the rows of a path if this process has them open, and nobody has touched their files."""
    if base not in _open:
        return None
    rows, states = _open[base]
    try:
        if states and all(_state(file) == state for file, state in states.items()):
            _open.move_to_end(base)
            return rows
    except OSError:  # a file is gone
        pass
    del _open[base]
    return None


def _cached(build: Callable[[Path, bool], "Dataset"], base: Path, label: str) -> "Dataset":
    files = list(_files(base))
    damaged = next((file.name for file in files if not _is_intact(file)), None)
    rows = None
    if damaged is None:
        try:
            rows = build(base, False)
        except Exception as error:
            if not files or _cause(error, DataError, OSError) is not None:
                raise
            damaged = one_line(error)
    if rows is None:
        warn(f"the cache of {label} in {base} is damaged ({damaged}); it is built again")
        for file in files:
            file.unlink(missing_ok=True)
        shutil.rmtree(base, ignore_errors=True)
        rows = build(base, True)
    for file in _files(base):
        if not _seal(file).exists():
            _write_seal(file)
    return rows


def _files(base: Path) -> Iterator[Path]:
    """Yields the files of rows whose paths begin with ``base``, or that lie in a folder of that name."""
    for path in (*base.parent.glob(f"{base.name}*.arrow"), *base.rglob("*.arrow")):
        if not any(part.endswith(".incomplete") for part in path.parts):
            yield path


def _all_files(base: Path) -> Iterator[Path]:
    """Yields all that belongs to the rows of a path: seals and notes of ``datasets``, too."""
    for path in (*base.parent.glob(f"{base.name}*"), *base.rglob("*")):
        if path.suffix != ".lock" and path.is_file():
            yield path


def _seal(file: Path) -> Path:
    return file.with_name(f"{file.name}.seal")


def _write_seal(file: Path) -> None:
    with file.open("rb") as content:
        digest = file_digest(content, "blake2b").hexdigest()
    try:
        _seal(file).write_text(json.dumps([_state(file), digest]), encoding="utf-8")
    except OSError:  # the rows are there all the same
        _seal(file).unlink(missing_ok=True)


def _state(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _is_intact(file: Path) -> bool:
    """Returns whether a file is as it was built."""
    seal = _seal(file)
    if not seal.exists():
        return _is_valid(file)  # another process has built it and is about to seal it, or was killed there
    try:
        state, digest = json.loads(seal.read_text(encoding="utf-8"))
        if state == _state(file):
            return True
        seal.unlink()
        with file.open("rb") as content:
            return bool(file_digest(content, "blake2b").hexdigest() == digest)
    except ValueError:
        return False


def _is_valid(file: Path) -> bool:
    """Returns whether a file without a seal can be read."""
    import pyarrow  # type: ignore[import-untyped]

    try:
        with pyarrow.memory_map(str(file)) as source:
            pyarrow.ipc.open_stream(source).read_all().validate(full=True)
    except (pyarrow.ArrowException, OSError):
        return False
    return True


def _cause(error: BaseException, *kinds: type[BaseException]) -> Any:
    """Returns the first error of some kinds among an error and its causes."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kinds):
        cause = cause.__cause__ or cause.__context__
    return cause


def _one_line(error: Exception, label: str) -> DataError:
    """Returns the error that tells what kept rows from being built."""
    if (cause := _cause(error, DataError)) is not None:
        return DataError(str(cause))
    if (cause := _cause(error, OSError)) is not None:
        return DataError(
            f"{label} cannot be written to the cache {cache_folder()} ({one_line(cause)}). Free some space, "
            "or set HF_DATASETS_CACHE to another folder"
        )
    hint = ""
    if "abruptly died" in str(error):
        hint = ". A process was killed, probably because memory ran out: lower num_proc"
    return DataError(f"{label} cannot be prepared ({one_line(error)}){hint}")
