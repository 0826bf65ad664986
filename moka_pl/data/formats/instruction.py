"""Check instruction records; which form one has is told by its columns."""

from typing import TYPE_CHECKING, Any

from moka_pl.data.formats.chat_rows import check_conversations, check_messages, check_turns, show
from moka_pl.data.formats.trees import FIELDS as TREE_FIELDS
from moka_pl.errors_part import DataError

if TYPE_CHECKING:
    from datasets import Features

FORMS = (
    "Expected a chat (messages, or conversations of ShareGPT, or text with '### Human:' turns), "
    "an instruction (instruction, input, output of Alpaca, or instruction, context, response of Dolly), or a "
    "prompt with its completion (prompt and completion, prompt and response, inputs and targets). Name other "
    "columns with `columns`"
)

_CHATS = {"messages": check_messages, "conversations": check_conversations, "text": check_turns}
_PAIRS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("inputs", None, "targets"),
)
"""Columns of what is asked, of what may be added to it, and of the answer."""

INSTRUCTION_FIELDS = (
    *_CHATS,
    *dict.fromkeys(name for pair in _PAIRS for name in pair if name is not None),
    *(field for field in TREE_FIELDS if field not in _CHATS),
)
"""All fields that a form has; the option `columns` may map them."""


def instruction_features() -> "Features":
    """Columns of a checked instruction row; each form leaves the columns of the other one empty."""
    from datasets import Features, List, Value

    message = {"role": Value("string"), "content": Value("large_string"), "trained": Value("bool")}
    return Features(
        {
            "where": Value("string"),
            "instruction": Value("large_string"),
            "input": Value("large_string"),
            "output": Value("large_string"),
            "messages": List(message),
        }
    )


def check_instruction(record: dict[str, Any], where: str, context: str) -> dict[str, Any]:
    """Check one record of any form.

    A record with the columns of several forms (Alpaca's own `text` beside `instruction`, or the empty columns
    that a Parquet file of mixed records has) is taken in the first form whose columns are not empty: chat,
    instruction, prompt and completion, `text` with turns.

    Args:
        record: The record as it was read.
        where: Its position, for messages.
        context: Unused.

    Returns:
        A row with the columns of `instruction_features`.

    Raises:
        DataError: A field is missing, empty of answers, or has the wrong type.
    """
    del context
    row: dict[str, Any] = {"where": where, "instruction": "", "input": "", "output": "", "messages": []}
    for field in ("messages", "conversations"):
        if record.get(field) is not None:
            return row | {"messages": _CHATS[field](record[field], where)}
    asked, added, answer = _pair(record)
    if answer not in record and record.get("text") is not None and asked not in record:
        return row | {"messages": check_turns(record["text"], where)}
    for field, column in (("instruction", asked), ("output", answer)):
        if column not in record:
            found = ", ".join(map(str, record)) or "nothing"
            raise DataError(f"{where}: field {column!r} is missing; found: {found}. {FORMS}.")
        row[field] = _text(record[column], where, column)
    if added is not None and record.get(added) is not None:
        row["input"] = _text(record[added], where, added)
    return row


def _pair(record: dict[str, Any]) -> tuple[str, str | None, str]:
    """The pair of columns that the record fills best; Alpaca's where none is in it."""
    filled = [(record.get(asked) is not None, record.get(answer) is not None) for asked, _, answer in _PAIRS]
    present = [(asked in record, answer in record) for asked, _, answer in _PAIRS]
    scores = [sum(values) * 3 + sum(columns) for values, columns in zip(filled, present, strict=True)]
    return _PAIRS[scores.index(max(scores))]


def _text(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} must be text, found {show(value)}. {FORMS}.")
    return value
