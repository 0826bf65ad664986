"""Parquet, in batches and rows whose size is known before they are made."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.data.files.parquet_footer import claims
from moka_pl.data.files.text import MAX_RECORD, expands, expansion_limit, shown, too_long
from moka_pl.errors import DataError

if TYPE_CHECKING:
    import pyarrow  # type: ignore[import-untyped]

FREE_VALUES = 1_000_000
"""Values that any file may hold; a larger file has at most one for each of its bytes."""

_BATCH = 1024


def parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a Parquet file row by row; rows are located by their number.

    A few bytes of such a file may stand for any number of values, or for one long text in a million rows.
    Texts are therefore read by reference (as dictionaries), and counted before they are written out.
    """
    from pyarrow import parquet

    _check_claims(path)
    with path.open("rb") as source:
        metadata = parquet.read_metadata(source)
        plain = parquet.ParquetFile(source, metadata=metadata).schema_arrow
        texts = _texts(metadata, plain)
        file = parquet.ParquetFile(source, metadata=metadata, read_dictionary=texts)
        number, total, limit = 0, 0, expansion_limit(path.stat().st_size)
        for batch in file.iter_batches(batch_size=_BATCH):
            size = _size(batch)
            total += size
            if total > limit:
                raise expands(path)
            step = batch.num_rows if size <= MAX_RECORD else 1
            for start in range(0, batch.num_rows, step):
                part = batch.slice(start, step)
                if step == 1 and _size(part) > MAX_RECORD:
                    raise too_long(f"{shown(path)}, row {number + 1}: the row")
                for row in _written_out(part, plain):
                    number += 1
                    yield f"{shown(path)}, row {number}", row


def _written_out(batch: "pyarrow.RecordBatch", plain: "pyarrow.Schema") -> list[dict[str, Any]]:
    """Returns the rows of a batch, whose texts may be references, under its schema without them."""
    columns = [
        column if column.type == field.type else column.cast(field.type)
        for column, field in zip(batch.columns, plain, strict=True)
    ]
    return type(batch).from_arrays(columns, schema=plain).to_pylist()  # type: ignore[no-any-return]


def _check_claims(path: Path) -> None:
    """Raises ``DataError`` for a file that holds too much for its size."""
    values = size = 0
    for count, uncompressed in claims(path):
        values += count
        size += uncompressed
    length = path.stat().st_size
    if values > max(FREE_VALUES, length):
        raise DataError(
            f"{shown(path)} has {values:,} values in {length:,} bytes: it is damaged or a decompression "
            "bomb. If it is neither, write its data as .jsonl"
        )
    if size > expansion_limit(length):
        raise expands(path)


def _texts(metadata: Any, plain: "pyarrow.Schema") -> list[str]:
    """Returns the paths of the columns of text that can be read by reference."""
    # Neither maps nor views can be cast from references.
    others = [field.name for field in plain if "map<" in str(field.type) or "_view" in str(field.type)]
    columns = map(metadata.schema.column, range(metadata.num_columns))
    return [
        column.path
        for column in columns
        if column.physical_type == "BYTE_ARRAY"
        and column.logical_type.type in ("STRING", "NONE")
        and not any(f"{column.path}.".startswith(f"{name}.") for name in others)
    ]


def _size(array: "pyarrow.Array | pyarrow.RecordBatch") -> int:
    """Returns the bytes of the texts in an array or batch, and eight for every other value."""
    from pyarrow import compute, types

    if hasattr(array, "columns"):
        return sum(map(_size, array.columns))
    kind = array.type
    if types.is_dictionary(kind) and _is_text(kind.value_type):
        lengths = compute.binary_length(array.dictionary)
        return int(compute.sum(lengths.take(array.indices)).as_py() or 0)
    if types.is_struct(kind):
        return sum(map(_size, array.flatten()))
    if types.is_map(kind):
        return int(array.nbytes)
    if types.is_nested(kind):
        return 8 * len(array) + (_size(array.flatten()) if hasattr(array, "flatten") else array.nbytes)
    return int(array.nbytes) if _is_text(kind) else 8 * len(array)


def _is_text(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    checks = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(check(kind) for check in checks)
