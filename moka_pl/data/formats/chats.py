"""Chats: ``messages``, ShareGPT's ``conversations``, and turns written into one ``text``."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from moka_pl.data.formats.base import Format, Record, require, require_text, show
from moka_pl.errors import DataError

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

Message = dict[str, Any]
"""``role``, ``content`` (text) and ``trained``."""


def _messages(record: Record) -> dict[str, list[Message]]:
    """Messages with ``role``, ``content`` (text, or a list of text parts) and maybe ``loss_weight``."""
    return {"messages": _parse_messages(record["messages"])}


def _parse_messages(value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"field 'messages' must be a list of messages, found {show(value)}")
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(value)]
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"field 'messages' has no assistant message to train on; found roles: {roles}. Add an answer or "
            "remove the chat"
        )
    return messages


def _conversations(record: Record) -> dict[str, list[Message]]:
    """Turns with ``from`` and ``value``.

    Such corpora hold parts of longer chats. Answers before the first question are left out. A part without an
    answer is returned untrained, and so counts as a dropped example.
    """
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise DataError(f"field 'conversations' must be a list of turns, found {show(turns)}")
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        field = f"conversations[{index}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"field {field!r} must be an object with from and value, found {show(turn)}")
        speaker, content = (require(turn, key, f"'{field}.{key}'") for key in ("from", "value"))
        role = SHAREGPT_ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
        if role is None:
            raise DataError(
                f"field '{field}.from' is {speaker!r}; known speakers are {', '.join(SHAREGPT_ROLES)}. "
                "Rename the speaker"
            )
        message = _message({"role": role, "content": content, "loss_weight": turn.get("loss_weight")}, field)
        if role != "assistant" or any(earlier["role"] == "user" for earlier in messages):
            messages.append(message)
    return {"messages": messages or [{"role": "user", "content": "", "trained": False}]}


def _turns(record: Record) -> dict[str, list[Message]]:
    """Turns in one text: ``### Human: ...### Assistant: ...``; the text of a turn is stripped."""
    text = require_text(record, "text")
    before, *turns = _TURN.split(text)  # text before the first turn, then role and text in turn
    if not turns or before.strip():
        raise DataError(
            f"field 'text' does not begin with '### Human:', found {show(text)}. Expected turns '### Human: "
            "...' and '### Assistant: ...'; map other columns with `columns`"
        )
    messages = [
        {"role": SHAREGPT_ROLES[speaker.lower()], "content": content.strip()}
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]
    return {"messages": _parse_messages(messages)}


def _message(value: object, field: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"field {field!r} must be an object with role and content, found {show(value)}")
    role, content = (require(value, key, f"'{field}.{key}'") for key in ("role", "content"))
    if role not in ROLES:
        raise DataError(
            f"field '{field}.role' is {role!r}; known roles are {', '.join(ROLES)}. Rename the role"
        )
    # Parquet fills absent fields with None.
    weight = value.get("loss_weight")
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
        raise DataError(f"field '{field}.loss_weight' must be a number, 0 or above, found {show(weight)}")
    trained = role == "assistant" and weight > 0
    return {"role": role, "content": _content(content, f"{field}.content"), "trained": trained}


def _content(value: object, field: str) -> str:
    """Returns the text of a message: a string, or a list of text parts to be joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise DataError(
            f"field '{field}' must be text or a list of {{type, text}} parts, found {show(value)}"
        )
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise DataError(
                f"field '{field}[{index}]' must be a part of type 'text', found {show(part)}. Only text can "
                "be trained on; remove other parts"
            )
        text = part.get("text") if part.get("text") is not None else part.get("value")
        if not isinstance(text, str):
            raise DataError(
                f"field '{field}[{index}]' has no 'text' (or 'value') that is text; found {show(part)}"
            )
        texts.append(text)
    return "".join(texts)


def _format(
    description: str, field: str, parse: Callable[[Record], dict[str, list[Message]]]
) -> Format[dict[str, list[Message]]]:
    return Format(description, (field,), lambda record: record.get(field) is not None, parse)


MESSAGES = _format("a chat (messages)", "messages", _messages)
CONVERSATIONS = _format("a chat of ShareGPT (conversations)", "conversations", _conversations)
TURNS = _format("a chat in one text with '### Human:' turns (text)", "text", _turns)
