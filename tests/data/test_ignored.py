"""Fields that are neither used nor known are named once, with their number, in every run."""

import json

import pytest

from moka_pl.data import CommonsenseData, DataError, InstructionData, MixtureData, MmluData, TextData
from moka_pl.data.encoding.report import EncodingReport, ignored_fields

ROWS = [
    {"instruction": f"Say {n}.", "output": f"{n}", "source": "x" if n < 3 else None, "id": n}
    for n in range(10)
]
CHOICES = [
    {"task": "t", "question": f"Q{n}?", "choices": ["a", "b"], "answer": 0, "context": "C"} for n in range(10)
]
TEXTS = [{"text": f"Text {n}.", "url": "u", "empty": []} for n in range(10)]


@pytest.fixture
def said(monkeypatch):
    lines = []
    for module in ("base", "mixture", "batching.streaming"):
        monkeypatch.setattr(f"moka_pl.data.{module}.rank_zero_info", lines.append)
    return lines


def ready(module, tokenizer, stage="fit"):
    module.connect(tokenizer)
    module.prepare_data()
    module.setup(stage)
    return module


def named(lines):
    found = [line for line in lines if "ignored" in line]
    lines.clear()
    return found


def test_every_data_module_names_them(tiny_tokenizer, write_jsonl, said):
    rows, choices, texts = (
        write_jsonl(f"{name}.jsonl", records) for name, records in (("a", ROWS), ("b", CHOICES), ("c", TEXTS))
    )
    for _ in range(2):  # the second time from the cache
        ready(InstructionData(rows), tiny_tokenizer)
        assert named(said) == ["instruction: ignored: id (10 rows), source (3 rows)"]
        ready(CommonsenseData(choices, validation_share=0.2), tiny_tokenizer)
        assert named(said) == ["commonsense: ignored: context (10 rows)"]
        ready(TextData(texts, max_length=8), tiny_tokenizer)
        assert named(said) == ["text: ignored: url (10 rows)"]
    parts = [InstructionData(rows, prompt="alpaca"), CommonsenseData(choices)]
    module = ready(MixtureData(parts), tiny_tokenizer)
    assert named(said) == [
        "instruction: ignored: id (10 rows), source (3 rows)",
        "commonsense: ignored: context (10 rows)",
    ]
    module.setup("validate")
    assert named(said) == []
    # Splits of the same rows count once.
    ready(InstructionData(rows, validation_path=rows, validation_share=0), tiny_tokenizer, None)
    assert named(said) == ["instruction: ignored: id (10 rows), source (3 rows)"]
    ready(InstructionData(rows, validation_path=rows), tiny_tokenizer, "test")
    assert named(said) == ["instruction: ignored: id (10 rows), source (3 rows)"]


def test_mmlu_names_them(tiny_tokenizer, tmp_path, said):
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        lines = ["question,choice0,choice1,choice2,choice3,answer,hint", *["Q?,a,b,c,d,0,h"] * 3]
        (tmp_path / split / f"anatomy_{split}.csv").write_text("\n".join(lines))
    ready(MmluData(tmp_path, shots=1), tiny_tokenizer, "test")
    assert named(said) == ["mmlu: ignored: hint (3 rows)"]


def test_fields_of_messages(tiny_tokenizer, write_jsonl, said):
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}], "name": "Ann"},
        {"role": "assistant", "content": "b", "mood": "good"},
    ]
    path = write_jsonl("a.jsonl", [{"messages": turns, "text": "t", "id": n} for n in range(3)])
    for prompt in ("chat", "alpaca"):
        report = ready(InstructionData(path, prompt=prompt, validation_share=0), tiny_tokenizer).report[
            "train"
        ]
        assert named(said) == [
            "instruction: ignored: text (3 rows), id (3 rows); "
            "ignored in messages: content[].cache (3), name (3), mood (3)"
        ]
        assert report.ignored["messages[].mood"] == 3


def test_columns_that_a_mapping_leaves_out(tiny_tokenizer, write_jsonl, said):
    path = write_jsonl("a.jsonl", [{"q": "a", "r": "b", "system": "S", "more": 1}])
    module = InstructionData(path, columns={"prompt": "q", "response": "r"}, validation_share=0)
    ready(module, tiny_tokenizer)
    assert named(said) == ["instruction: ignored: system (1 row), more (1 row)"]
    module = InstructionData(
        path, columns={"prompt": "q", "response": "r", "system": "system"}, validation_share=0
    )
    ready(module, tiny_tokenizer)
    assert named(said) == ["instruction: ignored: more (1 row)"]


def test_fields_of_trees(tiny_tokenizer, write_jsonl, said):
    shared = {"lang": "en", "rank": 0, "deleted": "False", "user_id": "u"}
    tree = [
        {"message_id": "1", "parent_id": None, "role": "prompter", "text": "a", **shared},
        {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "b", **shared, "weight": 0},
        {"message_id": "3", "parent_id": "2", "role": "prompter", "text": "c", **shared},
        {"message_id": "4", "parent_id": "3", "role": "assistant", "text": "d", **shared, "weight": 1},
    ]
    module = ready(InstructionData(write_jsonl("a.jsonl", tree), validation_share=0), tiny_tokenizer)
    assert named(said) == ["instruction: ignored: user_id (4 rows)"]
    assert module.report["train"].trained == len(
        tiny_tokenizer("d<|im_end|>", add_special_tokens=False).input_ids
    )


def test_streams_name_them_when_they_are_seen_and_after_a_pass(tiny_tokenizer, write_jsonl, said):
    path = write_jsonl("a.jsonl", ROWS)
    module = InstructionData(path, validation_path=path, streaming=True, batch_size=2, stream_buffer=2)
    loader = ready(module, tiny_tokenizer).train_dataloader()
    said.clear()
    next(iter(loader))
    assert named(said) == ["instruction train, so far: ignored: source (2 rows), id (2 rows)"]
    list(module.train_dataloader())
    first, whole = named(said)
    assert whole == "instruction train, pass 1, ignored: id (10 rows), source (3 rows)"
    assert first.startswith("instruction train, so far: ignored: ")


def test_untrained_answers(tiny_tokenizer, write_jsonl, said):
    path = write_jsonl(
        "a.jsonl", [*ROWS[3:5], {"prompt": "a", "completion": " "}, {"prompt": "a", "completion": ""}]
    )
    module = ready(InstructionData(path, validation_share=0), tiny_tokenizer)
    empty = f"2 empty answers ({path}, line 3; {path}, line 4)"
    assert f"instruction: ignored: id (2 rows); not trained: {empty}" in said
    assert (module.report["train"].kept, module.report["train"].dropped) == (2, 2)
    module = ready(InstructionData(path, validation_share=0, empty_answers="train"), tiny_tokenizer)
    assert module.report["train"].kept == 4
    masked = write_jsonl("b.jsonl", [{**ROWS[3], "weight": 0}])
    with pytest.raises(
        DataError, match="1 examples of instruction train were dropped: none has an answer to"
    ):
        ready(InstructionData(masked, validation_share=0), tiny_tokenizer)
    with pytest.raises(DataError, match="empty_answers must be 'skip' or 'train', got 'no'"):
        InstructionData(path, empty_answers="no")


def test_answers_before_the_first_question(tiny_tokenizer, write_jsonl, said):
    turns = [
        {"from": speaker, "value": text} for speaker, text in (("gpt", "x"), ("human", "a"), ("gpt", "b"))
    ]
    ready(
        InstructionData(write_jsonl("a.jsonl", [{"conversations": turns}]), validation_share=0),
        tiny_tokenizer,
    )
    assert named(said) == ["instruction: ignored in messages: answers before the first question (1)"]


def test_held_out_rows_do_not_depend_on_what_is_ignored(tiny_tokenizer, write_jsonl):
    plain = write_jsonl("a.jsonl", [{key: row[key] for key in ("instruction", "output")} for row in ROWS])
    more = write_jsonl("b.jsonl", ROWS)
    outputs = [
        InstructionData(path, validation_share=0.3)._split_rows("validation")["output"]
        for path in (plain, more)
    ]
    assert outputs[0][:] == outputs[1][:]


def test_arrow_tables_fill_in_what_rows_do_not_have(tiny_tokenizer, tmp_path, said):
    from pyarrow import Table, parquet

    calls = [{"function": {"name": name, "arguments": {name: 1}}} for name in ("f", "g")]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": calls}]
    rows = [
        {"messages": turns, "tools": [{"name": "f"}]},
        {"messages": [turns[0], {**turns[1], "tool_calls": None}]},
    ]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    module = InstructionData(tmp_path / "a.parquet", validation_share=0)
    more = [json.loads(text) if text else None for text in module._split_rows("train")["more"]]
    assert more == [{"options": {"tools": [{"name": "f"}]}, "messages": [{}, {"tool_calls": calls}]}, None]


def test_the_line():
    assert ignored_fields({}) == ""
    many = ignored_fields({f"c{n}": 1 for n in range(30)} | {"messages[].x": 1234})
    assert many.endswith("c19 (1 row) and 10 more; ignored in messages: x (1,234)")
    both = EncodingReport(read=1, ignored={"a": 1}) + EncodingReport(read=2, ignored={"a": 2, "b": 1})
    assert (both.read, both.ignored) == (3, {"a": 3, "b": 1})
