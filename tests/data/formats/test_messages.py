"""Messages in all spellings: who speaks, what is trained, what is refused."""

import pytest

from moka_pl.data import DataError
from moka_pl.data.formats.instruction import parse_instruction
from moka_pl.data.reading import parse_record

CALL = {"name": "f", "arguments": "{}"}


def parse(**record):
    return parse_record(parse_instruction, record, "f.jsonl, line 3")


def two(kind, **more):
    """A chat of two answers, the first of which has more fields."""
    role, content, names = {
        "messages": ("role", "content", ("user", "assistant")),
        "conversations": ("from", "value", ("human", "gpt")),
    }[kind]
    turns = [{role: names[n % 2], content: text} for n, text in enumerate(("2+2?", "5", "sure?", "4"))]
    return {kind: [turns[0], turns[1] | more, *turns[2:]]}


def trained(row):
    return [message["content"] for message in row["messages"] if message["trained"]]


@pytest.mark.parametrize("kind", ["messages", "conversations"])
@pytest.mark.parametrize("name", ["weight", "loss_weight", "train", "training", "loss"])
def test_weights_of_turns(kind, name):
    for value in (0, 0.0, False, "0", "false", " False "):
        assert trained(parse(**two(kind, **{name: value}))) == ["4"]
    for value in (1, 1.0, True, "1", "true", None, ""):
        assert trained(parse(**two(kind, **{name: value}))) == ["5", "4"]
    assert parse(**two(kind, **{name: 0}))["messages"][1]["content"] == "5"  # stays in the context
    for value in (0.1, -1, 2, float("nan"), "half", [0], {"a": 1}):
        with pytest.raises(DataError, match=rf"line 3: field '{kind}\[1\]\.{name}' must be .*0 or 1 .*found"):
            parse(**two(kind, **{name: value}))


def test_only_answers_are_trained():
    chat = [
        {"role": "user", "content": "a", "train": True, "weight": 1},
        {"role": "assistant", "content": "b"},
    ]
    row = parse(messages=chat)
    assert trained(row) == ["b"]
    assert row["ignored"] == '{"messages[].train of user": 1}'


def test_one_weight_of_zero_is_enough():
    assert trained(parse(**two("messages", weight=1, train=False))) == ["4"]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "a", "output": "b"},
        {"prompt": "a", "completion": "b"},
        two("messages"),
        two("conversations"),
        {"text": "### Human: a### Assistant: b"},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    ],
)
def test_weights_of_rows(record):
    for name in ("weight", "loss_weight", "train", "training"):
        row = parse(**record, **{name: "false" if name == "train" else 0})
        assert row["messages"]
        assert trained(row) == []
        assert parse(**record, **{name: True})["messages"] == parse(**record)["messages"]
    with pytest.raises(DataError, match=r"line 3: field 'weight' must be .*found float 0\.5.*`columns`"):
        parse(**record, weight=0.5)


@pytest.mark.parametrize(
    ("message", "part"),
    [
        (
            {"role": "assistant", "content": "x", "mask": True},
            r"'messages\[1\]\.mask' cannot be used.*train: f",
        ),
        ({"role": "assistant", "content": "x", "train_detail": [{"begin_offset": 0}]}, "train_detail"),
        ({"role": "critic", "content": "x"}, "'critic'; known roles are system, developer"),
        ({"role": ["user"], "content": "x"}, "known roles"),
        ({"from": "critic", "value": "x"}, "'critic'; known speakers"),
        ({"from": "function_call", "value": "weather in Paris"}, "must be a list of calls, or its JSON"),
        ({"from": "function_call", "value": '{"arguments": {}}'}, "must be a call with name and arguments"),
        (
            {"role": "assistant", "content": "", "tool_calls": "call f"},
            r"\.tool_calls' must be a list of calls",
        ),
        ({"role": "assistant", "content": None}, "content' must be text or a list"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "content' must be text or a list"),
        ({"role": "user", "content": None, "name": "Ann"}, "content' must be text or a list"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "part of type 'text'"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "part of type 'text'"),
    ],
)
def test_wrong_messages(message, part):
    with pytest.raises(DataError, match=rf"^f\.jsonl, line 3: .*{part}"):
        parse(messages=[{"role": "user", "content": "a"}, message, {"role": "assistant", "content": "b"}])


@pytest.mark.parametrize(
    ("turn", "role", "calls"),
    [
        ({"from": "function_call", "value": '{"name": "f"}'}, "assistant", '"arguments": {}'),
        ({"from": "tool_call", "value": '[{"function": {"name": "f"}}]'}, "assistant", '"name": "f"'),
        ({"from": "function_response", "value": "x"}, "tool", ""),
        ({"from": "model", "value": "x"}, "assistant", ""),
        ({"role": "developer", "content": "x"}, "developer", ""),
        ({"role": "ipython", "content": "x"}, "ipython", ""),
        ({"role": "function", "name": "f", "content": "x"}, "tool", '"name": "f"'),
        ({"role": "assistant", "content": None, "function_call": CALL}, "assistant", '"tool_calls"'),
    ],
)
def test_speakers_and_calls(turn, role, calls):
    end = {"from": "gpt", "value": "b"} if "from" in turn else {"role": "assistant", "content": "b"}
    start = {"from": "human", "value": "a"} if "from" in turn else {"role": "user", "content": "a"}
    for kind in ("messages", "conversations"):
        row = parse(**{kind: [start, turn, end]})
        assert [message["role"] for message in row["messages"]] == ["user", role, "assistant"]
        assert calls in row["more"]


def test_messages_may_be_json_text():
    text = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    assert trained(parse(messages=text)) == trained(parse(conversations=text)) == ["b"]


def test_prompts_and_completions_of_messages():
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = parse(prompt=[*asked, asked[0]], completion=[asked[1]])
    assert [message["trained"] for message in row["messages"]] == [False, False, False, True]
    assert trained(parse(prompt=asked[:1], completion="c")) == ["c"]
    assert trained(parse(prompt="a", completion=asked[1:])) == ["b"]
    with pytest.raises(DataError, match="'completion' has no assistant message"):
        parse(prompt="a", completion=asked[:1])
