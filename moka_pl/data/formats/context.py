"""What a row says beside its question and answer: system prompt, history, tools, its weight."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from moka_pl.data.formats.base import Record, from_json, has_value, ignored_in, is_empty, show
from moka_pl.data.formats.messages import Message, is_trained, parse_messages
from moka_pl.errors import DataError

_SYSTEM = ("system", "system_prompt", "system_message")
_HISTORY = ("history", "chat_history")
_WEIGHTS = ("weight", "loss_weight", "train", "training")
_TOOLS = ("tools", "functions")
_OPTIONS = ("documents", "chat_template_kwargs")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
CONTEXT_FIELDS = (*_SYSTEM, *_HISTORY, *_WEIGHTS, *_TOOLS, *_OPTIONS)
"""Fields that rows of every format may have; the option ``columns`` may map them."""

_LEAVE_OUT = ", or leave the column out with `columns`"


def earlier_messages(record: Record) -> list[Message]:
    """Returns the system prompt and the earlier turns of a row, none of which is trained.

    Raises:
        DataError: A field is malformed, or two system prompts differ.
    """
    messages: list[Message] = []
    for name in _SYSTEM:
        if has_value(record, name):
            text = record[name]
            if not isinstance(text, str):
                raise DataError(f"field {name!r} must be text, found {show(text)}. Write a text{_LEAVE_OUT}")
            messages = joined(messages, [_said("system", text)])
    for name in _HISTORY:
        if has_value(record, name):
            messages = joined(messages, _history(record[name], name, ignored_in(record)))
    return messages


def joined(*parts: list[Message]) -> list[Message]:
    """Returns one chat of several parts, with one system prompt, which stands first.

    Raises:
        DataError: Parts have different system prompts.
    """
    systems: list[Message] = []
    others: list[Message] = []
    for part in parts:
        leading = part[:1] if part and part[0]["role"] == "system" else []
        systems += leading
        others += part[len(leading) :]
    if any(message["content"] != systems[0]["content"] for message in systems):
        raise DataError(f"the row has two different system prompts. Keep one of them{_LEAVE_OUT}")
    return systems[:1] + others


def template_options(record: Record) -> dict[str, Any]:
    """Returns what a row gives the chat template beside messages: tools, documents, options of its own.

    Raises:
        DataError: A field is malformed.
    """
    options: dict[str, Any] = {}
    for name in _TOOLS:
        if has_value(record, name) and "tools" not in options and (tools := _tools(record[name], name)):
            options["tools"] = (
                [{"type": "function", "function": t} for t in tools] if name != "tools" else tools
            )
    for name in _OPTIONS:
        value = from_json(record[name]) if has_value(record, name) else None
        if name == "documents" and isinstance(value, list) and all(isinstance(v, Mapping) for v in value):
            options[name] = value
        elif name != "documents" and isinstance(value, Mapping):
            options |= {key: item for key, item in value.items() if not is_empty(item)}
        elif value is not None:
            ignored_in(record)[name] += 1
    return options


def row_is_trained(record: Record) -> bool:
    """Returns whether a row's answers are trained: unless it has a weight of 0.

    Raises:
        DataError: The weight is neither 0 nor 1.
    """
    return is_trained(record, _WEIGHTS, advice=_LEAVE_OUT)


def refuse_media(record: Record) -> None:
    """Raises ``DataError`` for a row with pictures, films or sound."""
    for name in _MEDIA:
        if has_value(record, name):
            raise DataError(
                f"field {name!r} holds {show(record[name])}. Only text can be trained on: remove the row"
                f"{_LEAVE_OUT}"
            )


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content, "trained": False, "more": {}}


def _history(value: object, name: str, ignored: Counter[str]) -> list[Message]:
    """Earlier turns: pairs of question and answer, as LLaMA-Factory has them, or messages."""
    turns = from_json(value)
    if not isinstance(turns, list):
        raise DataError(
            f"field {name!r} must be a list of [question, answer] pairs or of messages, found {show(value)}. "
            f"Write one{_LEAVE_OUT}"
        )
    if all(isinstance(turn, Mapping) for turn in turns):
        return [message | {"trained": False} for message in parse_messages(turns, name, ignored)]
    messages: list[Message] = []
    for index, pair in enumerate(turns):
        texts = pair if isinstance(pair, list | tuple) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"field '{name}[{index}]' must be a pair [question, answer] of texts, found {show(pair)}. "
                f"Correct it{_LEAVE_OUT}"
            )
        messages += [_said("user", texts[0]), _said("assistant", texts[1])]
    return messages


def _tools(value: object, name: str) -> list[Any]:
    """Definitions of tools, as a list, its JSON, or a list of the JSON of each."""
    tools = [] if value == "null" else from_json(value)
    tools = [from_json(tool) for tool in tools] if isinstance(tools, list) else tools
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(
            f"field {name!r} must be a list of tool definitions or its JSON text, found {show(value)}. "
            f"Correct it{_LEAVE_OUT}"
        )
    return tools
