"""Chats: ``messages``, ShareGPT's ``conversations``, and turns written into one ``text``."""

import re
from collections.abc import Callable

from moka_pl.data.formats.base import Format, Record, from_json, ignored_in, require_text, show
from moka_pl.data.formats.messages import SPEAKERS, Message, parse_messages
from moka_pl.errors import DataError

_TURN = re.compile(r"(?<!#)###\s*(Human|Assistant|System)\s*:")


def _messages(record: Record) -> dict[str, list[Message]]:
    """Messages with ``role``, ``content`` (text, or a list of text parts) and maybe more."""
    return {"messages": _answered(parse_messages(record["messages"], "messages", ignored_in(record)))}


def _answered(messages: list[Message]) -> list[Message]:
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages) or "none"
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
    turns = from_json(record["conversations"])
    if not isinstance(turns, list):
        raise DataError(f"field 'conversations' must be a list of turns, found {show(turns)}")
    messages: list[Message] = []
    for message in parse_messages(turns, "conversations", ignored_in(record)) if turns else []:
        if message["role"] != "assistant" or any(earlier["role"] == "user" for earlier in messages):
            messages.append(message)
        else:
            ignored_in(record)["messages[].answers before the first question"] += 1
    return {"messages": messages or [{"role": "user", "content": "", "trained": False, "more": {}}]}


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
        {"role": SPEAKERS[speaker.lower()], "content": content.strip()}
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]
    return {"messages": _answered(parse_messages(messages, "messages", ignored_in(record)))}


def _format(
    description: str, field: str, parse: Callable[[Record], dict[str, list[Message]]]
) -> Format[dict[str, list[Message]]]:
    return Format(description, (field,), lambda record: record.get(field) is not None, parse)


MESSAGES = _format("a chat (messages)", "messages", _messages)
CONVERSATIONS = _format("a chat of ShareGPT (conversations)", "conversations", _conversations)
TURNS = _format("a chat in one text with '### Human:' turns (text)", "text", _turns)
