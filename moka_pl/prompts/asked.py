"""What a model reads of a prompt to which there is no answer yet."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moka_pl.errors import DataError
from moka_pl.prompts.chats import beside_text, conversation
from moka_pl.prompts.choice import CHOICE_PROMPTS, PromptFormat
from moka_pl.prompts.templates import alpaca_prompt, chat_prompt, require_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_row(text: str, location: str) -> dict[str, Any]:
    """Returns a text as a checked row, whose location messages name."""
    return {"location": location, "instruction": text, "input": "", "output": "", "messages": [], "more": ""}


def chat_row(turns: Sequence[Mapping[str, str]], location: str) -> dict[str, Any]:
    """Returns messages (``role``, ``content``) as a checked row, whose location messages name."""
    return text_row("", location) | {"messages": [{**turn, "trained": False} for turn in turns]}


def question(row: Mapping[str, Any]) -> str:
    """Returns an instruction, with its input after a blank line."""
    return f"{row['instruction']}\n\n{row['input']}" if row["input"] else str(row["instruction"])


def asked_text(
    row: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase", prompt_format: PromptFormat
) -> str:
    """Returns the text that a model is to continue.

    Args:
        row: A checked row, which ends with what is asked.
        tokenizer: The model's tokenizer.
        prompt_format: What surrounds the question.

    Raises:
        ConfigError: If ``chat`` is asked for, and the tokenizer has no chat template, or one that rejects a
            user message.
        DataError: If the chat template rejects the row's messages, or the format cannot hold them.
    """
    if prompt_format == "chat":
        if not row["messages"]:
            return chat_prompt(question(row), tokenizer)
        require_chat_template(tokenizer)
        return conversation(row, tokenizer).render(prompt=True)
    beside_text(row)
    if row["messages"]:
        roles = [turn["role"] for turn in row["messages"]]
        if roles != ["user"]:
            raise DataError(
                f"{row['location']}: the prompt format {prompt_format} takes one user message, but this chat "
                f"has the messages {', '.join(roles)}; set --prompt_format chat, or ask one question alone"
            )
        row = text_row(row["messages"][0]["content"], row["location"])
    if prompt_format == "alpaca":
        return alpaca_prompt(row["instruction"], row["input"])
    return question(row) if prompt_format == "raw" else CHOICE_PROMPTS[prompt_format].asked(question(row))
