"""What the footer of a Parquet file claims to hold, before a library acts on it.

pyarrow ends the whole process over some damaged footers when it is asked for the columns of a row group. The
footer is a struct in Thrift's compact protocol, which takes few lines to read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_FOOTER = 1 << 23
"""Most bytes of a footer: some fifty thousand columns of row groups."""

_MAGIC = b"PAR1"
_ROW_GROUPS, _COLUMNS, _COLUMN_METADATA, _NUM_VALUES, _UNCOMPRESSED_SIZE = 4, 1, 3, 5, 6
"""Numbers of fields in ``parquet.thrift``."""


def claims(path: Path) -> Iterator[tuple[int, int]]:
    """Yields number of values and uncompressed bytes of every column in every row group of a file.

    Nothing is yielded for a file that is none of Parquet's. A damaged footer raises some exception.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        tail = file.read()
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != _MAGIC or length > size - 12:
            return
        if length > MAX_FOOTER:
            raise ValueError(f"its footer has {length:,} bytes, more than {MAX_FOOTER:,}")
        file.seek(size - 8 - length)
        metadata = _Compact(file.read(length)).struct()
    for group in metadata.get(_ROW_GROUPS, []):
        for column in group.get(_COLUMNS, []):
            facts = column.get(_COLUMN_METADATA, {})
            yield facts.get(_NUM_VALUES, 0), facts.get(_UNCOMPRESSED_SIZE, 0)


class _Compact:
    """A reader of Thrift's compact protocol; structs become dictionaries from field numbers to values."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._index = 0

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._integer()
            kind = header & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        match kind:
            case 1 | 2 | 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._integer()
            case 7:
                return self._take(8)
            case 8:
                return self._take(self._varint())
            case 9 | 10:
                header = self._byte()
                count = header >> 4 if header >> 4 < 15 else self._varint()
                return [self._value(header & 15) for _ in range(count)]
            case 11:
                count = self._varint()
                kinds = self._byte() if count else 0
                return [(self._value(kinds >> 4), self._value(kinds & 15)) for _ in range(count)]
            case 12:
                return self.struct()
        raise ValueError(f"damaged footer: unknown type {kind}")

    def _byte(self) -> int:
        self._index += 1
        return self._data[self._index - 1]

    def _take(self, count: int) -> bytes:
        self._index += count
        if self._index > len(self._data):
            raise ValueError("damaged footer: it ends within a value")
        return self._data[self._index - count : self._index]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("damaged footer: a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
