"""Prompts without an answer, as the model reads them."""

import pytest

from moka_pl.errors import ConfigError, DataError
from moka_pl.prompts.asked import asked_text, chat_row, question, text_row
from moka_pl.prompts.segments import alpaca, chat
from moka_pl.prompts.templates import alpaca_prompt, cloze_prompt

WITH_INPUT = text_row("Add", "line 1") | {"input": "2 and 3"}
SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
ASKED = [{"role": "user", "content": "Hi"}]


def test_an_instruction_with_its_input(tiny_tokenizer):
    assert question(WITH_INPUT) == "Add\n\n2 and 3"
    assert asked_text(WITH_INPUT, tiny_tokenizer, "raw") == "Add\n\n2 and 3"
    assert asked_text(WITH_INPUT, tiny_tokenizer, "alpaca") == alpaca_prompt("Add", "2 and 3")
    assert asked_text(WITH_INPUT, tiny_tokenizer, "cloze") == cloze_prompt("Add\n\n2 and 3")


@pytest.mark.parametrize(
    "row", [WITH_INPUT, text_row("Hi", "line 1"), chat_row(SAID, "a"), chat_row(ASKED, "b")]
)
def test_it_is_what_training_puts_before_the_answer(row, tiny_tokenizer):
    answer = {"role": "assistant", "content": "Well.", "trained": True}
    trained = row | {"output": "Well.", "messages": row["messages"] and [*row["messages"], answer]}
    segments = chat(trained, tiny_tokenizer)
    before = "".join(one.text for one in segments[: max(i for i, one in enumerate(segments) if one.trained)])
    assert asked_text(row, tiny_tokenizer, "chat") == before
    if len(row["messages"]) < 2:
        assert asked_text(row, tiny_tokenizer, "alpaca") == alpaca(trained)[0].text


def test_a_chat_needs_a_chat_template(tiny_tokenizer):
    with pytest.raises(DataError, match="a: the prompt format raw takes one user message, but this chat has"):
        asked_text(chat_row(SAID, "a"), tiny_tokenizer, "raw")
    assert asked_text(chat_row(ASKED, "a"), tiny_tokenizer, "raw") == "Hi"
    tiny_tokenizer.chat_template = None
    for row in (chat_row(SAID, "a"), text_row("Hi", "a")):
        with pytest.raises(ConfigError, match="no chat template"):
            asked_text(row, tiny_tokenizer, "chat")
