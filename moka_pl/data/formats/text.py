"""Plain text: a field of a record, or a whole file."""

from pathlib import Path
from typing import TYPE_CHECKING

from moka_pl.data.files.text import shown
from moka_pl.data.formats.base import Record, names, require_text
from moka_pl.data.readers import read_texts
from moka_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, Features


def text_features() -> "Features":
    """Returns the columns of a text."""
    from datasets import Features, Value

    return Features({"location": Value("string"), "text": Value("large_string")})


def parse_text(record: Record, context: str) -> dict[str, str]:
    """Returns the text of a record, in the field named by ``context``.

    Raises:
        DataError: The field is missing or not text.
    """
    if context not in record:
        raise DataError(
            f"field {context!r} is missing; found: {names(record)}. Set `column` to the one with the text"
        )
    return {"text": require_text(record, context)}


def read_text_file(path: Path) -> "Dataset":
    """Reads a text file as one text; a very long one as several, cut at line breaks.

    Raises:
        DataError: The file is missing, empty, not UTF-8 or has an endless line.
    """
    from datasets import Dataset, Features, Value

    texts = read_texts(path)
    rows = {"location": [shown(path)] * len(texts), "text": texts, "ignored": [""] * len(texts)}
    # The columns of files of records, too, which may be read beside it.
    return Dataset.from_dict(rows, features=Features({**text_features(), "ignored": Value("large_string")}))
