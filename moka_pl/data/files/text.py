"""Text files as pieces and lines: compressed or not, in UTF-8 or UTF-16, never more at once than a record."""

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from moka_pl.errors import DataError, printable

MAX_RECORD = 1 << 24
"""Most characters of a record. A damaged or hostile file is refused before it fills the memory."""

MAX_EXPANSION = 100
"""Most bytes that a byte of a compressed file may stand for; of text it is 3 to 20, far more is a bomb."""

FREE_EXPANSION = 1 << 26
"""Bytes that any file may expand to."""

_PIECE = 1 << 20
_BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")


def shown(path: Path) -> str:
    """Returns a path as messages and rows name it: in one line of valid text, whatever the file's name."""
    return printable(str(path))


def expansion_limit(size: int) -> int:
    """Returns how many bytes may come out of ``size`` compressed bytes."""
    return max(FREE_EXPANSION, MAX_EXPANSION * size)


def lines(path: Path, newline: str | None = None) -> Iterator[tuple[int, str]]:
    r"""Reads the lines of a file, each with its number from 1 and its line break.

    Args:
        path: The file.
        newline: None reads the line breaks LF, CR and CRLF as ``\n``; ``""`` leaves them as they are.

    Raises:
        DataError: A line is too long, or not text.
    """
    with _open(path, newline) as file:
        number = 0
        while line := file.readline(MAX_RECORD + 1):
            number += 1
            if len(line) > MAX_RECORD:
                raise too_long(f"{shown(path)}, line {number}: the line")
            _check(path, line, number, 1)
            yield number, line


def pieces(path: Path, newline: str | None = None) -> Iterator[str]:
    """Reads a file in pieces; ``newline`` is as in ``lines``.

    Raises:
        DataError: A piece is not text.
    """
    with _open(path, newline) as file:
        number, column = 1, 1
        while piece := file.read(_PIECE):
            _check(path, piece, number, column)
            yield piece
            number, column = position(piece, len(piece), number, column)


def position(text: str, index: int, line: int, column: int) -> tuple[int, int]:
    """Returns line and column of a character of a text.

    Args:
        text: The text.
        index: The character's index.
        line: The line in which the text begins.
        column: The column at which it begins.
    """
    start = text.rfind("\n", 0, index)
    return line + text.count("\n", 0, index), column + index if start < 0 else index - start


def too_long(what: str) -> DataError:
    """Returns the error of a record beyond ``MAX_RECORD``; ``what`` says where, and what it is."""
    return DataError(
        f"{what} has more than {MAX_RECORD:,} characters, the most of a record. Split it into several records"
    )


def _check(path: Path, text: str, line: int, column: int) -> None:
    """Raises ``DataError`` for bytes that are no text; the text begins at a line and column."""
    if "\0" not in text and (text.isascii() or not _NOT_TEXT.search(text)):
        return
    wrong = _NOT_TEXT.search(text)
    assert wrong is not None
    line, column = position(text, wrong.start(), line, column)
    byte = ord(wrong[0]) & 0xFF
    what = (
        f"{shown(path)}, line {line}: byte 0x{byte:02x} at column {column} is not "
        f"{'text' if byte == 0 else 'UTF-8'}"
    )
    if byte == 0:
        raise DataError(f"{what}: the file is damaged, or its encoding is UTF-16 without a byte order mark")
    raise DataError(
        f"{what}: the file has another encoding, perhaps cp1252 (Excel's plain CSV). Save it as UTF-8 (in "
        "Excel: CSV UTF-8), or convert it, as `iconv -f cp1252 -t utf-8` does"
    )


class _Bounded(io.RawIOBase):
    """The bytes of a compressed file, as long as they are not too many for what they came out of."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._packed = path.open("rb")
        self._file = COMPRESSIONS[path.suffix.lower()](self._packed)
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._count += len(data)
        if self._count > expansion_limit(self._packed.tell()):
            raise expands(self._path)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        self._packed.close()
        super().close()


def expands(path: Path) -> DataError:
    """Returns the error of a file that expands beyond ``expansion_limit``."""
    return DataError(
        f"{shown(path)} expands to more than {MAX_EXPANSION} times its size: it is damaged or a "
        "decompression bomb. If it is neither, write its data uncompressed"
    )


def _zstd(file: IO[bytes]) -> IO[bytes]:
    import pyarrow  # type: ignore[import-untyped]

    return pyarrow.CompressedInputStream(file, "zstd")  # type: ignore[no-any-return]


COMPRESSIONS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
}
"""What unpacks compressed text files, by the last suffix of their names."""


def check_expansion(path: Path) -> None:
    """Raises ``DataError`` for a compressed file that begins like a decompression bomb, before it is read."""
    if path.suffix.lower() in COMPRESSIONS:
        with _Bounded(path) as file:
            rest = FREE_EXPANSION + _PIECE
            while rest > 0 and (piece := file.read(_PIECE)):
                rest -= len(piece)


def _open(path: Path, newline: str | None) -> io.TextIOWrapper:
    packed = path.suffix.lower() in COMPRESSIONS
    raw = io.BufferedReader(_Bounded(path), _PIECE) if packed else path.open("rb")
    head = raw.peek(4)
    encoding = next((name for bom, name in _BOMS.items() if head.startswith(bom)), "utf-8")
    # Wrong bytes come out as lone surrogates, so that the line that they stand in can be named.
    errors = "strict" if encoding == "utf-16" else "surrogateescape"
    return io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline=newline)
