"""One message of a chat: who speaks, what is said, whether it is trained, and what else the template gets."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from moka_pl.data.formats.base import Record, brief, from_json, is_empty, require, show
from moka_pl.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""ShareGPT's names of the speakers."""

WEIGHTS = ("weight", "loss_weight", "train", "training", "trainable", "loss")
"""Fields of a message that say whether it is trained: 0 or false, 1 or true."""

_SWITCHES = ("train", "training", "trainable")
_SPELLINGS = {"role", "content", "from", "value"}
_CALLS = ("function_call", "tool_call")
_REFUSED = {
    "mask": "It may be meant either way",
    "masked": "It may be meant either way",
    "train_detail": "A turn is trained as a whole or not at all",
    "training_detail": "A turn is trained as a whole or not at all",
}
_WORDS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}

Message = dict[str, Any]
"""``role``, ``content`` (text or None), ``trained``, and ``more``: all other fields, for the template."""


def parse_messages(value: object, field: str, ignored: Counter[str]) -> list[Message]:
    """Parses a list of messages, with ``role`` and ``content`` or with ``from`` and ``value``, or its JSON.

    Args:
        value: The list.
        field: What messages call it.
        ignored: Counts what is left out.

    Raises:
        DataError: It is no such list, or a message is malformed.
    """
    value = from_json(value)
    if not isinstance(value, list) or not value:
        raise DataError(f"field {field!r} must be a list of messages, found {show(value)}")
    return [_message(message, f"{field}[{index}]", ignored) for index, message in enumerate(value)]


def is_trained(record: Record, names: Sequence[str] = WEIGHTS, prefix: str = "", advice: str = "") -> bool:
    """Returns whether a message, or a whole record, is trained: unless one of its weights is 0 or false.

    Args:
        record: The message or record.
        names: Fields that may hold a weight.
        prefix: What stands before their names in messages.
        advice: What else there is to do about a wrong one.

    Raises:
        DataError: A weight is a fraction, or anything else than 0 or 1.
    """
    trained = True
    for name in names:
        if name in record and not is_empty(value := record[name]):
            kept = value == 1 if isinstance(value, int | float) and value in (0, 1) else None
            kept = _WORDS.get(value.strip().lower()) if isinstance(value, str) else kept
            if kept is None:
                raise DataError(
                    f"field '{prefix}{name}' must be a number, 0 or 1 (or false or true), found "
                    f"{show(value)}. An answer is trained in full or not at all: write 0 or 1{advice}"
                )
            trained = trained and kept
    return trained


def text_of(value: object, field: str, ignored: Counter[str]) -> str:
    """Returns the text of a message: a string, or a list of text parts to be joined.

    Args:
        value: The content.
        field: What messages call it.
        ignored: Counts what is left out of the parts.

    Raises:
        DataError: It is something else, or has parts that are no text.
    """
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
        others = (key for key in part if key not in ("type", "text", "value") and not is_empty(part[key]))
        ignored.update(f"messages[].content[].{key}" for key in others)
    return "".join(texts)


def _message(value: object, field: str, ignored: Counter[str]) -> Message:
    held: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
    sharegpt = "role" not in held and ("from" in held or field.startswith("conversations"))
    keys = ("from", "value") if sharegpt else ("role", "content")
    if keys[1] not in held and (other := "content" if sharegpt else "value") in held:
        keys = (keys[0], other)
    if not isinstance(value, Mapping):
        raise DataError(f"field {field!r} must be an object with {' and '.join(keys)}, found {show(value)}")
    for name, reason in _REFUSED.items():
        if not is_empty(value.get(name)):
            raise DataError(
                f"field '{field}.{name}' cannot be used. {reason}: write `train: false` into the turns that "
                "are not to be trained"
            )
    role, speaker = _role(value, keys[0], field)
    more = {n: v for n, v in value.items() if n not in (*keys, *WEIGHTS, *_REFUSED) and not is_empty(v)}
    for name in _SPELLINGS & more.keys():
        ignored[f"messages[].{name}"] += bool(more.pop(name))
    content = value.get(keys[1])
    if "tool_calls" in more:
        more["tool_calls"] = _listed(more["tool_calls"], f"{field}.tool_calls")
    elif speaker in _CALLS:
        more["tool_calls"], content = _calls(content, f"{field}.{keys[1]}"), None
    elif "function_call" in more:
        more["tool_calls"] = _calls(more.pop("function_call"), f"{field}.function_call")
    if not (role == "assistant" and more and is_empty(content)):
        content = text_of(require(value, keys[1], f"'{field}.{keys[1]}'"), f"{field}.content", ignored)
    elif not isinstance(content, str):
        content = None
    trained = is_trained(value, prefix=f"{field}.")
    if trained and role != "assistant":  # only answers are trained, whatever a turn asks for
        trained = False
        ignored.update(f"messages[].{name} of {role}" for name in _SWITCHES if not is_empty(value.get(name)))
    return {"role": role, "content": content, "trained": trained, "more": more}


def _role(value: Record, key: str, field: str) -> tuple[str, str]:
    """Returns the role of a message, and what the message calls it."""
    speaker = require(value, key, f"'{field}.{key}'")
    if key == "role":
        if speaker not in ROLES:
            raise DataError(
                f"field '{field}.role' is {brief(speaker)}; known roles are {', '.join(ROLES)}. Rename "
                "the role"
            )
        return ("tool" if speaker == "function" else speaker), speaker
    speaker = speaker.lower() if isinstance(speaker, str) else speaker
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(
            f"field '{field}.from' is {brief(speaker)}; known speakers are {', '.join(SPEAKERS)}. "
            "Rename the speaker"
        )
    return role, speaker


def _calls(value: object, field: str) -> list[dict[str, Any]]:
    """Returns ``tool_calls`` of one call with ``name`` and ``arguments``, of several, or of their JSON."""
    inner = [call.get("function", call) for call in _listed(value, field)]
    if not inner or not all(
        isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in inner
    ):
        raise DataError(
            f"field '{field}' must be a call with name and arguments, or its JSON, found {show(value)}. "
            "Correct the turn, or give it to another speaker"
        )
    return [{"type": "function", "function": {"arguments": {}, **call}} for call in inner]


def _listed(value: object, field: str) -> list[Any]:
    """Returns calls as a list: there may be one alone, and hub datasets store them as JSON text."""
    found = from_json(value)
    calls = [from_json(call) for call in (found if isinstance(found, list) else [found])]
    if not all(isinstance(call, Mapping) for call in calls):
        raise DataError(
            f"field '{field}' must be a list of calls, or its JSON, found {show(value)}. Correct the turn, "
            "or give it to another speaker"
        )
    return calls
