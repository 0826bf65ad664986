"""What is asked, and its answer: the columns of Alpaca, Dolly, FLAN, and prompts with completions."""

from typing import Any

from moka_pl.data.formats.base import (
    Format,
    MissingFieldError,
    Record,
    has_value,
    ignored_in,
    require,
    require_text,
)
from moka_pl.data.formats.messages import Message, parse_messages
from moka_pl.errors import DataError

_COLUMNS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("inputs", None, "targets"),
)
"""Columns of the instruction, of its optional input, and of the answer."""


def _fits(record: Record) -> bool:
    return any(asked in record or answer in record for asked, _, answer in _COLUMNS)


def _parse(record: Record) -> dict[str, Any]:
    asked, added, answer = max(_COLUMNS, key=lambda columns: _filled(record, columns[0], columns[2]))
    if answer not in record and has_value(record, "chosen"):
        raise MissingFieldError(
            f"field {answer!r} is missing, but there is 'chosen'. Preferences cannot be trained here; to "
            f"train the chosen answers map them with `columns: {{{asked}: {asked}, {answer}: chosen}}`"
        )
    if any(isinstance(require(record, name), list) for name in (asked, answer)):
        return {"messages": _chat(record, asked, answer)}
    row = {"instruction": require_text(record, asked), "output": require_text(record, answer)}
    if added is not None and has_value(record, added):
        row["input"] = require_text(record, added)
    return row


def _chat(record: Record, asked: str, answer: str) -> list[Message]:
    """Prompt and completion that are lists of messages, as TRL has them; only the completion is trained."""
    ignored, sides = ignored_in(record), []
    for name, role in ((asked, "user"), (answer, "assistant")):
        value = record[name]
        value = (
            [{"role": role, "content": require_text(record, name)}] if not isinstance(value, list) else value
        )
        sides.append(parse_messages(value, name, ignored))
    if not any(message["role"] == "assistant" for message in sides[1]):
        raise DataError(
            f"field {answer!r} has no assistant message to train on. Add an answer or remove the row"
        )
    return [message | {"trained": False} for message in sides[0]] + sides[1]


def _filled(record: Record, *columns: str) -> int:
    """Returns how well columns are filled: one that is there counts 1, one that holds something 3 more."""
    return sum((column in record) + 3 * has_value(record, column) for column in columns)


PAIRS = Format(
    "an instruction (instruction, input, output of Alpaca, or instruction, context, response of Dolly), or a "
    "prompt with its completion (prompt and completion, prompt and response, inputs and targets)",
    tuple(dict.fromkeys(column for columns in _COLUMNS for column in columns if column is not None)),
    _fits,
    _parse,
)
