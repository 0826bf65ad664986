"""Chats as chat templates take them, with all fields of their messages and tools, and what templates omit."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any

from moka_pl.errors import DataError, MokaError
from moka_pl.prompts.rendering import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, Any]

CALLS = ("tool_calls", "tools", "functions", "function_call", "tool_plan")
"""What a chat means something else without."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""What belongs to an answer that is trained; templates leave it out of earlier answers on purpose."""


EMPTY = "empty answers"
"""What answers without a text, which are not trained, are counted as."""


@dataclass(frozen=True)
class Chat:
    """A chat and the tokenizer whose template renders it.

    Attributes:
        tokenizer: A tokenizer with a chat template.
        location: Where the chat stands, for messages.
        turns: Its messages, with all the fields that ``apply_chat_template`` is given.
        trained: Which of them are trained.
        options: What else it is given, such as ``tools``.
    """

    tokenizer: "PreTrainedTokenizerBase"
    location: str
    turns: list[Turn]
    trained: list[bool]
    options: Mapping[str, Any] = field(default_factory=dict)

    def render(self, turns: Sequence[Turn] | None = None, *, prompt: bool = False, without: str = "") -> str:
        """Returns the template's text of all messages.

        Args:
            turns: Other messages, in place of the chat's.
            prompt: Whether it ends where an answer begins.
            without: An option to leave out.

        Raises:
            DataError: The template refuses the messages.
        """
        turns = self.turns if turns is None else turns
        options = {name: value for name, value in self.options.items() if name != without}
        try:
            return render_chat(self.tokenizer, turns, prompt=prompt, **options)
        except MokaError:
            raise
        except Exception as error:  # templates raise whatever they like
            roles = ", ".join(turn["role"] for turn in turns) or "none"
            reason = " ".join(str(error).split()).rstrip(".")
            raise DataError(
                f"{self.location}: the tokenizer's chat template rejects these messages ({roles}): "
                f"{reason}. Change the messages or their order, or use `prompt: alpaca`"
            ) from error

    def renders(self, turns: Sequence[Turn] | None = None, *, without: str = "", text: str) -> bool:
        """Returns whether the chat, changed, is another text.

        Args:
            turns: Other messages, in place of the chat's.
            without: An option to leave out.
            text: The text of the whole.
        """
        try:
            return self.render(turns, without=without) != text
        except DataError:
            return True

    def is_empty_answer(self, index: int) -> bool:
        """Whether a message has no content, nor anything else that the template writes."""
        turn = self.turns[index]
        if not is_blank(turn["content"]):
            return False
        bare = {"role": turn["role"], "content": turn["content"]}
        text = self.render(self.turns[: index + 1])
        return turn == bare or not self.renders([*self.turns[:index], bare], text=text)


def is_blank(text: str | None) -> bool:
    """Returns whether there is nothing to read in a text."""
    return not (text or "").strip()


def conversation(row: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> Chat:
    """Returns the chat of a checked row; an instruction and its output are a chat of two messages.

    Messages and options are passed on as they are, but for two things. A content of None is an empty text
    where the template would write "None". The arguments of a call that are JSON text are passed on as what
    they stand for where the template would put them into quotes once more.

    Raises:
        DataError: The template refuses the messages.
    """
    messages = row["messages"] or as_messages(row)
    more = json.loads(row.get("more") or "{}")
    further = more.get("messages") or [{} for _ in messages]
    turns = [
        {"role": message["role"], "content": message["content"], **others}
        for message, others in zip(messages, further, strict=True)
    ]
    trained = [message["trained"] for message in messages]
    options = more.get("options") or {}
    own = signature(tokenizer.apply_chat_template).parameters.keys() if options else ()
    if taken := next((name for name in options if name in own and name not in ("tools", "documents")), None):
        raise DataError(
            f"{row['location']}: field 'chat_template_kwargs' holds {taken!r}, which is no option of a "
            "template. Take it out of the row"
        )
    chat = Chat(tokenizer, row["location"], turns, trained, options)
    if any(turn["content"] is None for turn in turns):
        turns[:] = _with_content(chat)
    if any(_arguments(turns)):
        turns[:] = _with_objects(chat)
    return chat


def as_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns instruction and output as a user turn (instruction, blank line, input) and a trained answer."""
    question = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return [
        {"role": "user", "content": question, "trained": False},
        {"role": "assistant", "content": row["output"], "trained": True},
    ]


def left_out(
    row: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase", skip_empty: bool = False
) -> Counter[str]:
    """Counts what a row gives the chat template, but the template does not write.

    Args:
        row: A checked row.
        tokenizer: A tokenizer with a chat template.
        skip_empty: Whether empty answers count, too.

    Raises:
        DataError: The chat means something else without it: calls, tools, the content of a message, or the
            reasoning of an answer that is trained.
    """
    chat = conversation(row, tokenizer)
    fields = dict.fromkeys(name for turn in chat.turns for name in turn if name not in ("role", "content"))
    ignored: Counter[str] = Counter()
    answers = [index for index, trained in enumerate(chat.trained) if trained and skip_empty]
    if empty := sum(map(chat.is_empty_answer, answers)):
        ignored[EMPTY] = empty
    plain = [turn["role"] for turn in chat.turns] == ["user", "assistant"]
    if not any(chat.trained) or (plain and not fields and not chat.options):
        return ignored
    text = chat.render()
    for name in chat.options:
        if not chat.renders(without=name, text=text):
            if name in CALLS:
                raise _refused(chat, f"the row's {name!r}")
            ignored[name] += 1
    for name in fields:
        for index in _unwritten(chat, name, text):
            if name in CALLS or (name in REASONING and chat.trained[index]):
                where = f"{name!r} of message {index + 1} of {len(chat.turns)}"
                raise _refused(chat, where, ", or give its answer weight 0" if name in REASONING else "")
            ignored[f"messages[].{name}"] += 1
    for index, turn in enumerate(chat.turns):
        # What stands there anyway, such as the template's own system prompt, is written as well.
        if (turn["content"] or "").strip() not in text and not chat.renders(
            [*chat.turns[:index], turn | {"content": ""}, *chat.turns[index + 1 :]], text=text
        ):
            raise _refused(chat, f"the content of message {index + 1} of {len(chat.turns)} ({turn['role']})")
    return ignored


def beside_text(row: Mapping[str, Any], skip_empty: bool = False) -> Counter[str]:
    """Counts what a prompt without a chat template leaves out of a row, with ``skip_empty`` empty answers.

    Raises:
        DataError: The row means something else without it: calls, tools, or the reasoning of an answer.
    """
    more = json.loads(row.get("more") or "{}")
    options, messages = more.get("options") or {}, more.get("messages") or []
    names = [*options, *(name for message in messages for name in message)]
    if lost := next((name for name in names if name in (*CALLS, *REASONING)), None):
        raise DataError(
            f"{row['location']}: {lost!r} has no place in a prompt without a chat template. Use "
            "`prompt: chat`, or take it out of the row"
        )
    ignored = Counter(options.keys())
    ignored.update(f"messages[].{name}" for message in messages for name in message)
    answers = [message["content"] for message in row["messages"] if message["trained"]]
    answers = answers if row["messages"] else [row["output"]]
    if empty := sum(map(is_blank, answers if skip_empty else [])):
        ignored[EMPTY] = empty
    return ignored


def _unwritten(chat: Chat, name: str, text: str) -> list[int]:
    """Numbers of the messages with a field that the template does not write there."""
    holders = [index for index, turn in enumerate(chat.turns) if name in turn]
    if not chat.renders([_without(turn, name) for turn in chat.turns], text=text):
        return holders
    if len(holders) == 1 or name not in (*CALLS, *REASONING):
        return []
    counted = holders if name in CALLS else [index for index in holders if chat.trained[index]]
    return [
        index
        for index in counted
        if not chat.renders(
            [_without(turn, name) if i == index else turn for i, turn in enumerate(chat.turns)], text=text
        )
    ]


def _without(turn: Turn, name: str) -> Turn:
    # Transformers gives templates the same reasoning under all its names.
    names = REASONING if name in REASONING else (name,)
    return {field: value for field, value in turn.items() if field not in names}


def _refused(chat: Chat, what: str, advice: str = "") -> DataError:
    return DataError(
        f"{chat.location}: the tokenizer's chat template does not write {what}, so that the model would not "
        "see it. Use a tokenizer whose chat template does, or take it out of the row"
        f"{advice}"
    )


def _with_content(chat: Chat) -> list[Turn]:
    """The messages with a content that the template takes where they have None."""

    def filled(content: str | None) -> list[Turn]:
        return [turn | {"content": content} if turn["content"] is None else turn for turn in chat.turns]

    try:
        if chat.render(filled(None)) != chat.render(filled("None")):
            return filled(None)
    except DataError:
        pass
    return filled("")


def _with_objects(chat: Chat) -> list[Turn]:
    """The messages with objects for the arguments of their calls if the template quotes texts."""
    text = chat.render()
    if not any(quoted in text for call in _arguments(chat.turns) for quoted in _quoted(call["arguments"])):
        return chat.turns
    turns = deepcopy(chat.turns)
    for call in _arguments(turns):
        try:
            call["arguments"] = json.loads(call["arguments"])
        except ValueError:
            continue
    return turns


def _quoted(text: str) -> tuple[str, str]:
    return json.dumps(text), json.dumps(text, ensure_ascii=False)


def _arguments(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The functions that are called with arguments in one text."""
    calls = [call for turn in turns for call in _listed(turn.get("tool_calls")) if isinstance(call, dict)]
    functions = [call["function"] if isinstance(call.get("function"), dict) else call for call in calls]
    return [function for function in functions if isinstance(function.get("arguments"), str)]


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
