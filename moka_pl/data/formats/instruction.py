"""Rows of instructions and chats; which format a record has is told by its columns."""

import json
from typing import TYPE_CHECKING, Any

from moka_pl.data.formats.base import Fields, Record, from_json, has_value, names, parse_as
from moka_pl.data.formats.context import (
    CONTEXT_FIELDS,
    earlier_messages,
    joined,
    refuse_media,
    row_is_trained,
    template_options,
)
from moka_pl.data.formats.registry import INSTRUCTION_FORMATS
from moka_pl.data.formats.trees import FIELDS as TREE_FIELDS
from moka_pl.errors import DataError
from moka_pl.prompts.chats import as_messages, is_blank

if TYPE_CHECKING:
    from datasets import Features

INSTRUCTION_FIELDS = tuple(
    dict.fromkeys(
        [field for format in INSTRUCTION_FORMATS for field in format.fields] + [*TREE_FIELDS, *CONTEXT_FIELDS]
    )
)
"""All fields that a format has; the option ``columns`` may map them."""


def instruction_features() -> "Features":
    """Returns the columns of an instruction row; each format leaves the columns of the others empty.

    ``more`` is the JSON of what only some rows have: ``options`` of the chat template, such as its tools, and
    ``messages``, the further fields of each message.
    """
    from datasets import Features, List, Value

    message = {"role": Value("string"), "content": Value("large_string"), "trained": Value("bool")}
    return Features(
        {
            "location": Value("string"),
            "instruction": Value("large_string"),
            "input": Value("large_string"),
            "output": Value("large_string"),
            "messages": List(message),
            "more": Value("large_string"),
        }
    )


def parse_instruction(record: Record, context: str = "") -> dict[str, Any]:
    """Parses one record of any format to ``instruction_features``, without the location.

    A record with the columns of several formats (Alpaca's ``text`` beside ``instruction``, or the empty
    columns that a Parquet file of mixed records has) is taken in the first format whose columns are not
    empty. A row with earlier turns, or of weight 0, becomes a chat. ``context`` is not used.

    Raises:
        DataError: A field is missing, empty of answers, or has the wrong type.
    """
    row = {"instruction": "", "input": "", "output": "", "messages": []} | parse_as(
        INSTRUCTION_FORMATS, record
    )
    refuse_media(record)
    earlier, trained = earlier_messages(record), row_is_trained(record)
    if earlier or not trained:
        row["messages"] = joined(earlier, row["messages"] or as_messages(row))
    further = [message.pop("more", {}) for message in row["messages"]]
    if not trained:
        row["messages"] = [message | {"trained": False} for message in row["messages"]]
    more = {"options": template_options(record), "messages": further if any(further) else []}
    # Read back as it was written, whatever types Parquet had.
    return row | {"more": json.dumps(more, default=str) if any(more.values()) else ""}


def parse_prompt(record: Record) -> dict[str, Any]:
    """Parses one record of which only the question counts: an answer may be missing, and is left out.

    Returns:
        A row as of :func:`parse_instruction`, with an empty output. A chat ends with what is asked last.

    Raises:
        DataError: A field is missing or has the wrong type, or nothing is asked.
    """
    if not any(has_value(record, name) for name in (*_CHATS, *_ANSWERS)):
        raise DataError(
            f"nothing is asked in these fields: {names(record)}. Give prompt, instruction (and input), "
            "messages or conversations"
        )
    answered = dict(record)
    for name in _CHATS:
        turns = from_json(record.get(name))
        if isinstance(turns, list) and turns:
            answered[name] = [*turns, {"role": "assistant", "content": ""}]
    for asked, answer in _ANSWERS.items():
        answer = "response" if has_value(record, "context") and asked == "instruction" else answer
        if has_value(record, asked) and not any(has_value(record, name) for name in (answer, "response")):
            is_chat = isinstance(record[asked], list)
            answered[answer] = [{"role": "assistant", "content": ""}] if is_chat else ""
    row = parse_instruction(Fields(answered))
    turns = list(row["messages"])
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    more = json.loads(row["more"] or "{}")
    if more.get("messages"):
        row["more"] = json.dumps(more | {"messages": more["messages"][: len(turns)]})
    if not turns and is_blank(row["instruction"]):
        raise DataError("nothing is asked; give a text")
    return row | {"output": "", "messages": turns}


_CHATS = ("messages", "conversations")
_ANSWERS = {"instruction": "output", "prompt": "completion", "inputs": "targets"}
"""Columns of a question, and of the answer that a prompt lacks."""
