"""Check instruction records: the Alpaca form and the chat form."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moka_pl.data.errors import DataError

if TYPE_CHECKING:
    from datasets import Features

FORMS = "Expected the Alpaca form (instruction, input, output) or the chat form (messages)"
ROLES = ("system", "user", "assistant", "tool")


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
    """Check one record of either form.

    Args:
        record: The record as it was read. With `messages` it is a chat, else it must be in the Alpaca form.
        where: Its position, for messages.
        context: Unused.

    Returns:
        A row with the columns of `instruction_features`.

    Raises:
        DataError: A field is missing, empty of answers, or has the wrong type.
    """
    del context
    row: dict[str, Any] = {"where": where, "instruction": "", "input": "", "output": "", "messages": []}
    if record.get("messages") is not None:
        return row | {"messages": _messages(record["messages"], where)}
    for field in ("instruction", "output"):
        if field not in record:
            found = ", ".join(map(str, record)) or "nothing"
            raise DataError(f"{where}: field {field!r} is missing; found: {found}. {FORMS}.")
        row[field] = _text(record[field], where, field)
    if record.get("input") is not None:
        row["input"] = _text(record["input"], where, "input")
    return row


def _text(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} must be text, found {_show(value)}. {FORMS}.")
    return value


def _messages(value: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: field 'messages' must be a list of messages, found {_show(value)}. {FORMS}."
        )
    messages = [_message(message, where, f"messages[{index}]") for index, message in enumerate(value)]
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{where}: field 'messages' has no assistant message to learn from; found roles: {roles}. "
            "Add an answer or remove the chat."
        )
    return messages


def _message(value: object, where: str, field: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where}: field {field!r} must be an object with role and content, found {_show(value)}."
        )
    for key in ("role", "content"):
        if key not in value:
            raise DataError(
                f"{where}: field '{field}.{key}' is missing; found: {', '.join(map(str, value))}."
            )
    role = value["role"]
    if role not in ROLES:
        raise DataError(
            f"{where}: field '{field}.role' is {role!r}; known roles are {', '.join(ROLES)}. Rename the role."
        )
    # Parquet fills absent fields with None.
    weight = value.get("loss_weight")
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
        raise DataError(
            f"{where}: field '{field}.loss_weight' must be a number, 0 or above, found {_show(weight)}."
        )
    content = _content(value["content"], where, f"{field}.content")
    return {"role": role, "content": content, "trained": role == "assistant" and weight > 0}


def _content(value: object, where: str, field: str) -> str:
    """Text of a message: a string, or a list of text parts to be joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: field '{field}' must be text or a list of {{type, text}} parts, found {_show(value)}."
        )
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise DataError(
                f"{where}: field '{field}[{index}]' must be a part of type 'text', found {_show(part)}. "
                "Only text can be trained on; remove other parts."
            )
        text = part.get("text") if part.get("text") is not None else part.get("value")
        if not isinstance(text, str):
            raise DataError(
                f"{where}: field '{field}[{index}]' has no 'text' (or 'value') that is text; found "
                f"{_show(part)}."
            )
        texts.append(text)
    return "".join(texts)


def _show(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
