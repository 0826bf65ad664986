"""Damaged and hostile data files: rows or one line, never another exception."""

import bz2
import copy
import gzip
import json
import random
from functools import partial

import pyarrow
import pytest
from pyarrow import parquet

from moka_pl.data.encoding.examples import SegmentEncoder
from moka_pl.data.formats.choice import choice_features, parse_choice
from moka_pl.data.formats.instruction import instruction_features, parse_instruction
from moka_pl.data.formats.llm_adapters import name_tasks
from moka_pl.data.formats.mmlu import parse_mmlu
from moka_pl.data.formats.text import parse_text, text_features
from moka_pl.data.formats.trees import join_trees
from moka_pl.data.readers import stream
from moka_pl.data.reading import _rows, read_rows
from moka_pl.data.sources import Shard
from moka_pl.errors import DataError
from moka_pl.prompts.segments import chat

RECORDS = [
    {"instruction": "Say hello.", "input": "", "output": "Hello, “you”!"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes", "weight": 1}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}], "system": "Be."},
    {"text": "### Human: Hi ### Assistant: Yes"},
    {
        "messages": [
            {"role": "user", "content": "?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
            },
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": [{"type": "text", "text": "One"}]},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
    {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Hi", "lang": "en", "rank": 0},
    {"task": "piqa", "question": "Which?", "choices": ["a", "b"], "answer": 0},
    {
        "instruction": "Please choose: Q Answer1: a Answer2: b Answer format: answer1/answer2",
        "answer": "answer1",
    },
    {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    {"activity_label": "x", "ctx": "a [b] c", "endings": ["a", "b"], "label": "1"},
    {"sentence": "The _ is", "option1": "a", "option2": "b", "answer": "1"},
    {"question": "q", "answer": True, "passage": "p"},
    {"question": "q", "choice0": "a", "choice1": "b", "choice2": "c", "choice3": "d", "answer": "2"},
]
ODD = [
    None,
    True,
    -1,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\0",
    "\ud800",
    "x" * 3000,
    [],
    {},
    [[]],
]
ODD += [
    {"": None},
    [None],
    "[1, 2",
    '{"a": 1',
    "9" * 4000,
    -0.0,
    ["a", 1],
    {"role": "user"},
    "user",
    "### Human:",
]
TOKENS = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n",
    b'"',
    b"\\",
    b"\\ud800",
    b",",
    b";",
    b"{",
    b"[",
    b"}",
    b"]",
]
TOKENS += [
    b"null",
    b"NaN",
    b"-",
    b"e999",
    b"1" * 4400,
    b"[" * 3000,
    b"\xed\xa0\x80",
    b"\\u0000",
    b"sep=;\n",
    b":",
]

READINGS = [
    (parse_instruction, "", instruction_features, join_trees),
    (parse_choice, "x", choice_features, name_tasks),
    (parse_mmlu, "anatomy", choice_features, None),
    (parse_text, "text", text_features, None),
]


def content(suffix, records):
    if suffix == ".json":
        return json.dumps(records).encode("utf-8", "surrogatepass")
    if suffix == ".csv":
        names = list(records[0])
        cells = [[str(record.get(name, "")) for name in names] for record in records]
        quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
        return "\r\n".join(",".join(row) for row in [names, *quoted]).encode("utf-8", "surrogatepass")
    return b"".join(json.dumps(record).encode("utf-8", "surrogatepass") + b"\n" for record in records)


def mutated(value, chance):
    """The value with something of it replaced by something odd, doubled or left out."""
    if chance.random() < 0.15:
        return copy.deepcopy(chance.choice(ODD))
    if isinstance(value, dict):
        value = {key: mutated(item, chance) for key, item in value.items() if chance.random() > 0.05}
        if value and chance.random() < 0.1:
            value[chance.choice(["role", "text", "answer", "messages", "\udc00", "", "tools"])] = (
                chance.choice(ODD)
            )
    elif isinstance(value, list):
        value = [mutated(item, chance) for item in value for _ in range(chance.choice([1, 1, 1, 1, 0, 2]))]
    return value


def damaged(data, chance):
    """The bytes with a few of them changed, cut, repeated or replaced."""
    for _ in range(chance.choice([1, 1, 2, 5])):
        if not data:
            break
        start = chance.randrange(len(data))
        end = min(len(data), start + chance.choice([1, 1, 4, 30]))
        kind = chance.randrange(6)
        if kind == 0:
            data = data[:start] + bytes([chance.randrange(256)]) + data[start + 1 :]
        elif kind == 1:
            data = data[:start] + data[end:]
        elif kind == 2:
            data = data[:start] + chance.choice(TOKENS) + data[start:]
        elif kind == 3:
            data = data[:end] + data[start:]
        elif kind == 4:
            data = data[:start]
        else:
            data = data[:start] + bytes(end - start) + data[end:]
    return data


def make(folder, number):
    """Writes one file, and returns it with how it was made."""
    chance = random.Random(number)
    records = [copy.deepcopy(chance.choice(RECORDS)) for _ in range(chance.choice([1, 1, 2, 4]))]
    if chance.random() < 0.5:
        records = [
            record for record in (mutated(record, chance) for record in records) if isinstance(record, dict)
        ]
        records = [record for record in records if record] or [{"a": 1}]
    suffix = chance.choice([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".csv.bz2"])
    path = folder / f"{number}{suffix}"
    if suffix == ".parquet":
        try:
            parquet.write_table(pyarrow.Table.from_pylist(records), path)
        except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError):
            parquet.write_table(pyarrow.Table.from_pylist(RECORDS[:1]), path)
        data = path.read_bytes()
    else:
        data = content(suffix.partition(".")[0] or "." + suffix.split(".")[1], records)
        data = data.decode("utf-8", "surrogatepass").encode(
            chance.choice(["utf-8", "utf-8", "utf-16", "utf-8-sig"]), "surrogatepass"
        )
    if suffix.endswith((".gz", ".bz2")):
        if chance.random() < 0.5:
            data = damaged(data, chance)
        data = (gzip.compress if suffix.endswith(".gz") else bz2.compress)(data)
    if chance.random() < 0.7:
        data = damaged(data, chance)
    path.write_bytes(data)
    return path


def check(path, number, tokenizer):
    """Reads a file as every data module would."""
    encoder = SegmentEncoder(tokenizer, partial(chat, tokenizer=tokenizer, skip_empty=True), 64, bos=False)
    for parse, context, features, gather in READINGS:
        message = ""
        try:
            rows = list(_rows(str(path), partial(stream, path), parse, context, {}, gather, True))
            assert rows
            if parse is parse_instruction:
                for row in rows:
                    encoder(row)
            if number % 10 == 0:
                read_rows(Shard(path, context=context), parse, features(), gather=gather)
        except DataError as error:
            message = str(error)
        assert not message or (str(path) in message and "\n" not in message and len(message) < 3000), message


@pytest.mark.slow
def test_damaged_and_hostile_files_give_rows_or_one_line(tmp_path, shared_tokenizer):
    for number in range(400):
        check(make(tmp_path, number), number, shared_tokenizer)
