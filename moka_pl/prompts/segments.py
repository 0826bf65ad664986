"""What the model reads for an instruction or a chat, and which parts of it are learned."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moka_pl.errors import DataError
from moka_pl.prompts.chats import Chat, beside_text, conversation, is_blank
from moka_pl.prompts.ends import template_ends, template_tail
from moka_pl.prompts.templates import alpaca_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Segment:
    """A stretch of the text of an example.

    Attributes:
        text: The text.
        trained: Whether its tokens enter the loss.
        end: Whether the tokenizer's end-of-sequence token follows it, trained as the text is.
    """

    text: str
    trained: bool
    end: bool = False


def alpaca(row: Mapping[str, Any], skip_empty: bool = False) -> list[Segment]:
    """Returns the Alpaca prompt, then the answer and the end-of-sequence token, both trained.

    A chat of one question and one answer is taken as instruction and output. With ``skip_empty`` an empty
    answer is not trained.

    Raises:
        DataError: The row is a chat with other messages, or has calls, tools or reasoning.
    """
    beside_text(row)
    instruction, context, output, trained = row["instruction"], row["input"], row["output"], True
    if row["messages"]:
        messages = row["messages"]
        if [message["role"] for message in messages] != ["user", "assistant"]:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{row['location']}: the alpaca prompt takes one user and one assistant message, but this "
                f"chat has the messages {roles} (a system prompt and a history count). Use `prompt: chat`"
            )
        instruction, output, trained = messages[0]["content"], messages[1]["content"], messages[1]["trained"]
    prompt = alpaca_prompt(instruction, context)
    trained = trained and not (skip_empty and is_blank(output))
    return [Segment(prompt, trained=False), Segment(output, trained=trained, end=True)]


def chat(
    row: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    skip_empty: bool = False,
    append_eos: bool = False,
) -> list[Segment]:
    """Returns the chat template's rendering; every assistant turn with its end-of-turn token is trained.

    The span of a turn is what the rendering of the messages up to and including it adds to the rendering of
    the messages before it (with the generation prompt), without the white space that the template writes
    after it. An Alpaca row becomes a user turn (instruction, blank line, input) and an assistant turn.

    Args:
        row: A checked row.
        tokenizer: A tokenizer with a chat template.
        skip_empty: Whether answers in which there is nothing to read are not trained.
        append_eos: Whether a turn that the template leaves without an end-of-turn token gets the tokenizer's
            end-of-sequence token.

    Raises:
        DataError: The tokenizer has no template, the template refuses the messages, or it renders the
            beginning of a chat differently from the whole, so that no span can be told.
    """
    require_template(tokenizer)
    chat = conversation(row, tokenizer)
    full = chat.render()
    tail, ends = template_tail(tokenizer), template_ends(tokenizer)
    segments: list[Segment] = []
    end = 0
    for index in range(len(chat.turns)):
        if not chat.trained[index] or (skip_empty and chat.is_empty_answer(index)):
            continue
        before = _before(chat, index)
        after = chat.render(chat.turns[: index + 1])
        if not (full.startswith(after) and after.startswith(before) and len(before) >= end):
            raise DataError(
                f"{chat.location}: the tokenizer's chat template renders message {index + 1} of "
                f"{len(chat.turns)} differently when more messages follow, so the answer's tokens cannot be "
                "located. Keep one assistant message per chat, give the others weight 0, or use "
                "`prompt: alpaca`"
            )
        segments.append(Segment(full[end : len(before)], trained=False))
        end = _turn_end(after, len(before), tail if append_eos else None)
        missing = append_eos and not ends
        if missing and (between := _leading_eos(full[end:], tokenizer.eos_token)):
            end, missing = end + between, False
        segments.append(Segment(full[len(before) : end], trained=True, end=missing))
    segments.append(Segment(full[end:], trained=False))
    return [segment for segment in segments if segment.text or segment.end]


def _before(chat: Chat, index: int) -> str:
    """Returns the text before an answer; before the first message of all, what any answer there follows."""
    if index:
        return chat.render(chat.turns[:index], prompt=True)
    # transformers refuses to render no messages: two answers have all before them in common.
    one, other = (chat.render([{"role": chat.turns[0]["role"], "content": answer}]) for answer in "ab")
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((place for place, (a, b) in pairs if a != b), len(one))]


def _turn_end(text: str, start: int, tail: str | None) -> int:
    """Where a turn ends that begins at ``start``; if all that the template adds is ``tail``, before that."""
    if tail is not None and not tail.strip() and text.endswith(tail):
        return max(start, len(text) - len(tail))
    return start + len(text[start:].rstrip())


def _leading_eos(text: str, eos: str | None) -> int:
    """Length of the end-of-sequence token at the beginning, which some templates write between turns only."""
    space = len(text) - len(text.lstrip())
    return space + len(eos) if eos and text.startswith(eos, space) else 0


def require_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises ``DataError`` for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise DataError(
            f"the tokenizer ({name}) has no chat template, which `prompt: chat` needs. Use `prompt: alpaca`, "
            "or the tokenizer of the model's chat variant"
        )


def require_end(tokenizer: "PreTrainedTokenizerBase", append_eos: bool | None) -> None:
    """Refuses a chat template that writes no end-of-turn token, unless it is said what to do about it.

    Raises:
        DataError: There is none, and ``append_eos`` is None, or true for a tokenizer without such a token.
    """
    if template_ends(tokenizer) != []:
        return
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    lacks = f"the chat template of the tokenizer ({name}) writes no end-of-turn token after an answer"
    if append_eos is None:
        raise DataError(
            f"{lacks}, so that the model would never learn to stop. Set `append_eos: true` to train the "
            f"tokenizer's end-of-sequence token ({tokenizer.eos_token!r}) after every answer, or "
            "`append_eos: false` to train without one"
        )
    if append_eos and tokenizer.eos_token_id is None:
        raise DataError(
            f"{lacks}, and the tokenizer has no end-of-sequence token to append. Set `tokenizer.eos_token`, "
            "or `append_eos: false`"
        )
