"""Rows of instructions and chats; which format a record has is told by its columns."""

from typing import TYPE_CHECKING, Any

from moka_pl.data.formats.base import Record, parse_as
from moka_pl.data.formats.registry import INSTRUCTION_FORMATS
from moka_pl.data.formats.trees import FIELDS as TREE_FIELDS

if TYPE_CHECKING:
    from datasets import Features

INSTRUCTION_FIELDS = tuple(
    dict.fromkeys([field for format in INSTRUCTION_FORMATS for field in format.fields] + list(TREE_FIELDS))
)
"""All fields that a format has; the option ``columns`` may map them."""


def instruction_features() -> "Features":
    """Returns the columns of an instruction row; each format leaves the columns of the others empty."""
    from datasets import Features, List, Value

    message = {"role": Value("string"), "content": Value("large_string"), "trained": Value("bool")}
    return Features(
        {
            "location": Value("string"),
            "instruction": Value("large_string"),
            "input": Value("large_string"),
            "output": Value("large_string"),
            "messages": List(message),
        }
    )


def parse_instruction(record: Record, context: str = "") -> dict[str, Any]:
    """Parses one record of any format to the columns of ``instruction_features``, without the location.

    A record with the columns of several formats (Alpaca's ``text`` beside ``instruction``, or the empty
    columns that a Parquet file of mixed records has) is taken in the first format whose columns are not
    empty. ``context`` is not used.

    Raises:
        DataError: A field is missing, empty of answers, or has the wrong type.
    """
    return {"instruction": "", "input": "", "output": "", "messages": []} | parse_as(
        INSTRUCTION_FORMATS, record
    )
