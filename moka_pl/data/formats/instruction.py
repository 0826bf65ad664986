"""Check instruction records; which form one has is told by its columns."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moka_pl.data.formats.trees import FIELDS as TREE_FIELDS
from moka_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Features


# Check chats: `messages`, ShareGPT's `conversations`, and turns written into one `text`.


ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""ShareGPT's names of the speakers."""

_TURN = re.compile(r"(?<!#)###\s*(Human|Assistant|System)\s*:")
_TEXT_ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}

Message = dict[str, Any]


def parse_messages(value: object, location: str) -> list[Message]:
    """Messages with `role`, `content` (text, or a list of text parts) and maybe `loss_weight`.

    Args:
        value: The field `messages`.
        location: Position of the record, for messages.

    Returns:
        `role`, `content` (text) and `trained` of every message.

    Raises:
        DataError: A message has another form, or no assistant speaks.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{location}: field 'messages' must be a list of messages, found {show(value)}.")
    messages = [_message(message, location, f"messages[{index}]") for index, message in enumerate(value)]
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{location}: field 'messages' has no assistant message to learn from; found roles: {roles}. "
            "Add an answer or remove the chat."
        )
    return messages


def parse_conversations(value: object, location: str) -> list[Message]:
    """ShareGPT's turns with `from` and `value`.

    Such corpora hold pieces of longer chats: answers before the first question are left out, and a piece
    without an answer comes back untrained, so that it is counted among the dropped examples.

    Args:
        value: The field `conversations`.
        location: Position of the record, for messages.

    Returns:
        `role`, `content` and `trained` of every message.

    Raises:
        DataError: A turn has another form or an unknown speaker.
    """
    if not isinstance(value, list):
        raise DataError(f"{location}: field 'conversations' must be a list of turns, found {show(value)}.")
    messages: list[Message] = []
    for index, turn in enumerate(value):
        field = f"conversations[{index}]"
        if not isinstance(turn, Mapping):
            raise DataError(
                f"{location}: field {field!r} must be an object with from and value, found {show(turn)}."
            )
        for key in ("from", "value"):
            if key not in turn:
                found = ", ".join(map(str, turn))
                raise DataError(f"{location}: field '{field}.{key}' is missing; found: {found}.")
        speaker = turn["from"]
        role = SHAREGPT_ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
        if role is None:
            raise DataError(
                f"{location}: field '{field}.from' is {speaker!r}; known speakers are "
                f"{', '.join(SHAREGPT_ROLES)}. Rename the speaker."
            )
        weight = turn.get("loss_weight")
        message = {"role": role, "content": turn["value"], "loss_weight": weight}
        checked = _message(message, location, field)
        if role != "assistant" or any(m["role"] == "user" for m in messages):
            messages.append(checked)
    return messages or [{"role": "user", "content": "", "trained": False}]


def parse_turns(value: object, location: str) -> list[Message]:
    """Turns in one text: `### Human: ...### Assistant: ...` (the Guanaco form).

    Args:
        value: The field `text`.
        location: Position of the record, for messages.

    Returns:
        `role`, `content` and `trained` of every turn; the text of a turn is stripped.

    Raises:
        DataError: The text does not begin with a turn, or no assistant speaks.
    """
    if not isinstance(value, str):
        raise DataError(f"{location}: field 'text' must be text, found {show(value)}.")
    pieces = _TURN.split(value)  # text before the first turn, then role and text in turn
    if len(pieces) < 3 or pieces[0].strip():
        raise DataError(
            f"{location}: field 'text' does not begin with '### Human:', found {show(value)}. Expected turns "
            "'### Human: ...' and '### Assistant: ...'; name other columns with `columns`."
        )
    turns = [
        {"role": _TEXT_ROLES[role], "content": text.strip()}
        for role, text in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    return parse_messages(turns, location)


def show(value: object) -> str:
    """Type and beginning of a value, for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _message(value: object, location: str, field: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{location}: field {field!r} must be an object with role and content, found {show(value)}."
        )
    for key in ("role", "content"):
        if key not in value:
            raise DataError(
                f"{location}: field '{field}.{key}' is missing; found: {', '.join(map(str, value))}."
            )
    role = value["role"]
    if role not in ROLES:
        raise DataError(
            f"{location}: field '{field}.role' is {role!r}; known roles are {', '.join(ROLES)}. "
            "Rename the role."
        )
    # Parquet fills absent fields with None.
    weight = value.get("loss_weight")
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
        raise DataError(
            f"{location}: field '{field}.loss_weight' must be a number, 0 or above, found {show(weight)}."
        )
    content = _content(value["content"], location, f"{field}.content")
    return {"role": role, "content": content, "trained": role == "assistant" and weight > 0}


def _content(value: object, location: str, field: str) -> str:
    """Text of a message: a string, or a list of text parts to be joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{location}: field '{field}' must be text or a list of {{type, text}} parts, found "
            f"{show(value)}."
        )
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise DataError(
                f"{location}: field '{field}[{index}]' must be a part of type 'text', found {show(part)}. "
                "Only text can be trained on; remove other parts."
            )
        text = part.get("text") if part.get("text") is not None else part.get("value")
        if not isinstance(text, str):
            raise DataError(
                f"{location}: field '{field}[{index}]' has no 'text' (or 'value') that is text; found "
                f"{show(part)}."
            )
        texts.append(text)
    return "".join(texts)


# Check instruction records; which form one has is told by its columns.


FORMS = (
    "Expected a chat (messages, or conversations of ShareGPT, or text with '### Human:' turns), "
    "an instruction (instruction, input, output of Alpaca, or instruction, context, response of Dolly), or a "
    "prompt with its completion (prompt and completion, prompt and response, inputs and targets). Name other "
    "columns with `columns`"
)

_CHATS = {"messages": parse_messages, "conversations": parse_conversations, "text": parse_turns}
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
            "location": Value("string"),
            "instruction": Value("large_string"),
            "input": Value("large_string"),
            "output": Value("large_string"),
            "messages": List(message),
        }
    )


def parse_instruction(record: dict[str, Any], location: str, context: str) -> dict[str, Any]:
    """Check one record of any form.

    A record with the columns of several forms (Alpaca's own `text` beside `instruction`, or the empty columns
    that a Parquet file of mixed records has) is taken in the first form whose columns are not empty: chat,
    instruction, prompt and completion, `text` with turns.

    Args:
        record: The record as it was read.
        location: Its position, for messages.
        context: Unused.

    Returns:
        A row with the columns of `instruction_features`.

    Raises:
        DataError: A field is missing, empty of answers, or has the wrong type.
    """
    del context
    row: dict[str, Any] = {"location": location, "instruction": "", "input": "", "output": "", "messages": []}
    for field in ("messages", "conversations"):
        if record.get(field) is not None:
            return row | {"messages": _CHATS[field](record[field], location)}
    asked, added, answer = _pair(record)
    if answer not in record and record.get("text") is not None and asked not in record:
        return row | {"messages": parse_turns(record["text"], location)}
    for field, column in (("instruction", asked), ("output", answer)):
        if column not in record:
            found = ", ".join(map(str, record)) or "nothing"
            raise DataError(f"{location}: field {column!r} is missing; found: {found}. {FORMS}.")
        row[field] = _text(record[column], location, column)
    if added is not None and record.get(added) is not None:
        row["input"] = _text(record[added], location, added)
    return row


def _pair(record: dict[str, Any]) -> tuple[str, str | None, str]:
    """The pair of columns that the record fills best; Alpaca's where none is in it."""
    filled = [(record.get(asked) is not None, record.get(answer) is not None) for asked, _, answer in _PAIRS]
    present = [(asked in record, answer in record) for asked, _, answer in _PAIRS]
    scores = [sum(values) * 3 + sum(columns) for values, columns in zip(filled, present, strict=True)]
    return _PAIRS[scores.index(max(scores))]


def _text(value: object, location: str, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{location}: field {field!r} must be text, found {show(value)}. {FORMS}.")
    return value
