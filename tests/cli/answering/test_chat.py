"""A chat in the terminal."""

import pytest

from moka_pl.cli.answering.chat import chat
from moka_pl.cli.answering.sampling import Sampling
from moka_pl.cli.answering.session import Session
from moka_pl.prompts.templates import alpaca_prompt


@pytest.fixture
def talk(loaded, monkeypatch, capsys):
    """Has a user type lines into a chat; returns the prompts that were answered, stdout and stderr."""

    def run(*lines, prompt_format="chat", answer=None, **options):
        model, tokenizer = loaded.model, loaded.tokenizer
        typed = iter(lines)
        asked = []

        def read(prompt):
            line = next(typed, None)
            if line is None:
                raise EOFError
            if isinstance(line, type):
                raise line
            return line

        def tokens(session, ids):
            asked.append(tokenizer.decode(ids))
            if answer is not None:
                raise answer
            print("Well.")
            return "Well."

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr("moka_pl.cli.answering.chat.print_tokens", tokens)
        capsys.readouterr()
        chat(Session(model, tokenizer, prompt_format, True, options.get("system", ""), Sampling()))
        printed = capsys.readouterr()
        return asked, printed.out, printed.err

    return run


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


OPEN = "<|im_start|>assistant\n"
HI = turn("user", "Hi")


def test_it_remembers_what_was_said_until_it_begins_anew(talk):
    asked, out, err = talk("Hi", "", "Bye", "/reset", "Hi")
    assert asked == [
        HI + OPEN,
        HI + turn("assistant", "Well.") + turn("user", "Bye") + OPEN,
        HI + OPEN,
    ]
    assert out == "Well.\n" * 3 + "\n"  # the last one after Ctrl-D
    assert err.splitlines() == [
        "/reset begins anew, /exit ends; Ctrl-C stops an answer",
        "the chat begins anew",
    ]


def test_a_system_message_stands_first(talk):
    asked, *_ = talk("Hi", system="Be brief.")
    assert asked == [turn("system", "Be brief.") + HI + OPEN]


@pytest.mark.parametrize("end", ["/exit", "/quit", KeyboardInterrupt, EOFError])
def test_it_ends(end, talk):
    asked, out, _ = talk("Hi", end, "Bye")
    assert len(asked) == 1
    assert out == "Well.\n" + "\n" * isinstance(end, type)


def test_a_stopped_answer_is_forgotten(talk):
    asked, _, err = talk("Hi", "Hi", answer=KeyboardInterrupt())
    assert asked == [HI + OPEN] * 2
    assert err.count("(stopped)") == 2


def test_a_chat_that_is_too_long_goes_on(talk):
    asked, _, err = talk("Hi", "word " * 200, "/help")
    assert len(asked) == 1
    assert "the chat has 1,0" in err
    assert "no room for an answer in the model's context of 512; shorten it; /reset begins anew\n" in err
    assert err.count("/exit ends") == 2


def test_other_formats_have_no_history(talk):
    asked, _, err = talk("Hi", "Bye", prompt_format="alpaca")
    assert asked == [alpaca_prompt("Hi"), alpaca_prompt("Bye")]
    assert "each prompt stands alone (prompt format alpaca)" in err
