"""System prompts, history and pictures beside a question and its answer."""

import json

import pytest

from moka_pl.data import DataError
from moka_pl.data.formats.instruction import parse_instruction
from moka_pl.data.reading import parse_record

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = [
    {"instruction": "a", "output": "b"},
    {"instruction": "a", "context": "", "response": "b"},
    {"prompt": "a", "response": "b"},
    {"inputs": "a", "targets": "b"},
    {"messages": CHAT},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"text": "### Human: a### Assistant: b"},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
]
HISTORY = [("user", "q", False), ("assistant", "r", False)]
HISTORY_MESSAGES = [{"role": role, "content": text} for role, text, _ in HISTORY]
OWN = [("user", "a", False), ("assistant", "b", True)]


def parse(**record):
    return parse_record(parse_instruction, record, "f.jsonl, line 3")


def turns(row):
    return [(message["role"], message["content"], message["trained"]) for message in row["messages"]]


@pytest.mark.parametrize("record", ROWS)
@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_system_prompts(record, name):
    row = parse(**record, **{name: "S"})
    assert turns(row) == [("system", "S", False), *OWN]
    assert row["ignored"] == ""
    for nothing in ("", None):
        assert parse(**record, **{name: nothing})["messages"] == parse(**record)["messages"]


@pytest.mark.parametrize("record", ROWS)
def test_history(record):
    pairs, named = [["q", "r"]], HISTORY_MESSAGES
    shared = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]
    for history in (pairs, json.dumps(pairs), named, json.dumps(named), shared):
        row = parse(**record, history=history, system="S")
        assert turns(row) == [("system", "S", False), *HISTORY, *OWN]
        assert row["ignored"] == ""
    for nothing in ([], None, ""):
        assert parse(**record, history=nothing)["messages"] == parse(**record)["messages"]


def test_input_stays_with_its_instruction():
    row = parse(instruction="a", input="i", output="b", history=[["q", "r"]])
    assert turns(row) == [*HISTORY, ("user", "a\n\ni", False), OWN[1]]


def test_one_system_prompt():
    chat = [{"role": "system", "content": "S"}, *CHAT]
    assert turns(parse(messages=chat, system="S")) == [("system", "S", False), *OWN]
    assert turns(parse(messages=CHAT, system="S", system_prompt="S")) == [("system", "S", False), *OWN]
    # It stands before the history, wherever it comes from.
    named = [{"role": "system", "content": "S"}, *HISTORY_MESSAGES]
    for record in ({"messages": chat, "history": [["q", "r"]]}, {"messages": CHAT, "history": named}):
        assert turns(parse(**record, system="S")) == [("system", "S", False), *HISTORY, *OWN]
        assert turns(parse(**record)) == [("system", "S", False), *HISTORY, *OWN]
    for record in (
        {"messages": chat, "system": "T"},
        {"messages": CHAT, "system": "S", "system_prompt": "T"},
    ):
        with pytest.raises(
            DataError, match=r"line 3: .*two different system prompts.*Keep one of them, .*`columns`"
        ):
            parse(**record)


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"system": ["S"]}, "'system' must be text, found list"),
        ({"history": "we talked"}, "'history' must be a list of .question, answer. pairs or of messages"),
        ({"history": [["q"]]}, r"'history\[0\]' must be a pair"),
        ({"history": [["q", None]]}, r"'history\[0\]' must be a pair"),
        ({"history": [{"role": "user"}]}, r"'history\[0\]\.content' is missing"),
        ({"tools": "hammer, saw"}, "'tools' must be a list of tool definitions or its JSON text"),
        ({"tools": ["hammer"]}, "'tools' must be a list of tool definitions"),
        ({"images": ["a.png"]}, r"'images' holds list .*Only text can be trained"),
        ({"image": {"bytes": b"x"}}, "'image' holds dict"),
        ({"audio": "a.wav"}, "'audio' holds str"),
    ],
)
def test_wrong_context(more, part):
    for record in ROWS:
        with pytest.raises(DataError, match=rf"^f\.jsonl, line 3: field {part}"):
            parse(**record, **more)


def test_preferences_are_refused_with_the_way_out():
    with pytest.raises(
        DataError, match=r"line 3: .*Preferences .*`columns: {prompt: prompt, completion: cho"
    ):
        parse(prompt="a", chosen="b", rejected="c")
    assert turns(parse(messages=CHAT, chosen="b", rejected="c")) == OWN
