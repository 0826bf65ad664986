"""Check records of plain text."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, Features


def text_features() -> "Features":
    """Columns of a checked text."""
    from datasets import Features, Value

    return Features({"location": Value("string"), "text": Value("large_string")})


def parse_text(record: dict[str, Any], location: str, context: str) -> dict[str, Any]:
    """Check one record of plain text.

    Args:
        record: The record as it was read.
        location: Its position, for messages.
        context: Name of the field that holds the text.

    Returns:
        A row with the columns of `text_features`.

    Raises:
        DataError: The field is missing or no text.
    """
    if context not in record:
        found = ", ".join(map(str, record)) or "nothing"
        raise DataError(f"{location}: field {context!r} is missing; found: {found}. Name it by `column`.")
    text = record[context]
    if not isinstance(text, str):
        raise DataError(f"{location}: field {context!r} must be text, found {type(text).__name__} {text!r}.")
    return {"location": location, "text": text}


def read_text_file(path: Path) -> "Dataset":
    """A text file as one text.

    Raises:
        DataError: The file is missing, empty or not UTF-8.
    """
    from datasets import Dataset

    if not path.is_file():
        raise DataError(
            f"{path} does not exist (looked at {path.absolute()}). Check the spelling of the path."
        )
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8. Save the file in the "
            "UTF-8 encoding."
        ) from error
    if not text.strip():
        raise DataError(f"{path} holds no text. Give a file with some.")
    return Dataset.from_dict({"location": [str(path)], "text": [text]}, features=text_features())
