"""Whatever a record holds, it is parsed and rendered, or refused in one line."""

import random

import pytest
from shared.templates import LATEST_REASONING, TOOLS, USER_AND_ASSISTANT

from moka_pl.data import DataError
from moka_pl.data.formats.choice import CHOICE_FIELDS, parse_choice
from moka_pl.data.formats.instruction import INSTRUCTION_FIELDS, parse_instruction
from moka_pl.data.formats.llm_adapters import name_tasks
from moka_pl.data.formats.mmlu import parse_mmlu
from moka_pl.data.formats.text import parse_text
from moka_pl.data.formats.trees import join_trees
from moka_pl.data.reading import parse_record, rename, without_fill
from moka_pl.prompts.chats import beside_text, left_out
from moka_pl.prompts.segments import alpaca, chat

FIELDS = [
    *INSTRUCTION_FIELDS,
    *CHOICE_FIELDS,
    *["images", "chosen", "id", "lang", "rank", "deleted", "sol1", "label", "ctx", "subject"],
]
IN_MESSAGES = [
    "role",
    "content",
    "from",
    "value",
    "weight",
    "train",
    "tool_calls",
    "function_call",
    "name",
    "reasoning_content",
    "mask",
    "x",
]
BASES = [
    "messages",
    "conversations",
    "instruction output",
    "prompt completion",
    "question choices answer",
    "",
]
BASES += ["message_id parent_id role text", "question answer passage", "goal sol1 sol2 label", "text"]
TEXTS = [
    "",
    "a",
    " ",
    "0",
    "[]",
    "{}",
    "null",
    '{"name": "f"}',
    '[["q", "r"]]',
    "\ud800",
    "\x00",
    "A",
    "answer1",
]
TEXTS += [
    "### Human: a### Assistant: b",
    "Please choose: q Answer1: a Answer2: b\n\nAnswer format: answer1/answer2",
]
SCALARS = [*TEXTS, None, 0, 1, -1, 0.5, float("nan"), float("inf"), True, False, 10**30, b"x"]
ROLES = [
    "user",
    "assistant",
    "system",
    "tool",
    "developer",
    "function",
    "human",
    "gpt",
    "function_call",
    None,
    [],
]


def value(rng, depth=0):
    kind = rng.random()
    if kind < 0.5 or depth > 3:
        return rng.choice(SCALARS)
    if kind < 0.7:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind < 0.8:
        return {rng.choice(IN_MESSAGES): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [message(rng, depth + 1) for _ in range(rng.randrange(1, 5))]


def message(rng, depth=0):
    content = rng.choice(["a", "b", "", None, [{"type": "text", "text": "x"}], value(rng, depth + 1)])
    fields = {
        rng.choice(["role", "role", "from"]): rng.choice(ROLES),
        rng.choice(["content", "value"]): content,
    }
    arguments = rng.choice(["{}", "x", {"a": 1}, None, [], 3])
    calls = [{"type": "function", "function": {"name": rng.choice(["f", None, 3]), "arguments": arguments}}]
    for name in rng.sample(IN_MESSAGES, rng.randrange(3)):
        fields[name] = calls if name == "tool_calls" and rng.random() < 0.7 else value(rng, depth + 1)
    return fields


def record(rng):
    names = [*rng.choice(BASES).split(), *rng.sample(FIELDS, rng.randrange(4))]
    return {name: rng.choice(["a", [message(rng) for _ in range(3)], value(rng)]) for name in names}


def refused_in_one_line(function, *arguments):
    """The function's result, or None after an error of one line."""
    try:
        return function(*arguments)
    except DataError as error:
        message = str(error)
    assert "\n" not in message
    return None


def list_of(gather, records):
    return list(gather(records))


def try_all(one, tokenizer, template):
    for parse, context in ((parse_choice, "t"), (parse_mmlu, ""), (parse_text, "text")):
        refused_in_one_line(parse_record, parse, rename(one, {}), "x", context)
    for gather in (join_trees, name_tasks):
        refused_in_one_line(list_of, gather, [("x", rename(one, {}))])
    row = refused_in_one_line(parse_record, parse_instruction, rename(without_fill(one), {}), "x")
    if row is not None:
        tokenizer.chat_template = template
        for render in (chat, left_out):
            refused_in_one_line(render, row, tokenizer, True)
        for render in (alpaca, beside_text):
            refused_in_one_line(render, row, True)
    return row


FOUND = {
    "from with content": {
        "messages": [{"role": "user", "content": "a"}, {"from": "gpt", "content": ["b"], "x": 1}]
    },
    "spelled twice": {
        "messages": [{"role": "assistant", "content": None, "value": "b", "from": "gpt", "x": 1}]
    },
}


@pytest.mark.parametrize("name", FOUND)
def test_what_broke_something(tiny_tokenizer, name):
    try_all(FOUND[name], tiny_tokenizer, TOOLS)


@pytest.mark.slow
def test_any_record(tiny_tokenizer):
    rng = random.Random(0)
    templates = [tiny_tokenizer.chat_template, TOOLS, LATEST_REASONING, USER_AND_ASSISTANT]
    rows = [try_all(record(rng), tiny_tokenizer, templates[n % 4]) for n in range(6_000)]
    assert sum(row is not None for row in rows) > 100
