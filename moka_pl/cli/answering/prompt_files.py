"""Files of prompts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moka_pl.errors import ConfigError, DataError
from moka_pl.prompts.asked import text_row

#: What a file of plain prompts is called, compressed or not.
_TEXT = ".txt"


def check_prompts_file(file: Path) -> None:
    """Refuses a path that is no file, or of an unknown kind, without reading it.

    Raises:
        DataError: Naming it.
    """
    from moka_pl.data.readers import READERS, check_file, check_source, suffix_of

    check_file(file)
    if _is_text(file):
        if not file.stat().st_size:
            raise DataError(f"{file} is empty (0 bytes). Give a file with at least one prompt")
    elif suffix_of(file) is None:
        known = ", ".join([_TEXT, *READERS])
        raise DataError(f"{file} has the unknown file type {file.suffix!r}. Name it by one of {known}")
    else:
        check_source(file)


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """Reads all prompts of a file as checked rows, each with its location.

    A text file has one on each line that is not blank. In the other kinds of files a record's ``prompt``,
    ``instruction`` (and ``input``), ``messages`` or ``conversations`` asks; an answer beside it is left out.

    Raises:
        ConfigError: If there is none.
        DataError: If the file or a record cannot be used.
    """
    check_prompts_file(file)
    rows = list(_lines(file) if _is_text(file) else _records(file))
    if not rows:
        raise ConfigError(f"{file} has no prompts; write one on each line")
    return rows


def _is_text(file: Path) -> bool:
    from moka_pl.data.files.text import COMPRESSIONS

    suffix = file.suffix.lower()
    return file.name.lower().removesuffix(suffix if suffix in COMPRESSIONS else "").endswith(_TEXT)


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    from moka_pl.data.files.text import check_expansion, lines, shown

    check_expansion(file)
    for number, line in lines(file):
        if line.strip():
            yield text_row(line.removesuffix("\n"), f"{shown(file)}, line {number}")


def _records(file: Path) -> Iterator[dict[str, Any]]:
    from moka_pl.data.formats.instruction import parse_prompt
    from moka_pl.data.readers import located, stream

    for location, record in stream(file):
        with located(location):
            row = parse_prompt(record)
        yield {"location": location, **row}
