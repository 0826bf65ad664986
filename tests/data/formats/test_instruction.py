"""Every form of instruction data: what is read, and which tokens are trained."""

import csv
import json

import pytest

from moka_pl.data import DataError, InstructionData
from moka_pl.data.formats.instruction import parse_instruction
from moka_pl.data.reading import parse_record
from moka_pl.lm.scoring import IGNORE_INDEX

END = "<|im_end|>"
USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"


def message(role, content, **more):
    return {"role": role, "content": content, **more}


FORMS = {
    "alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "all of it"},
        f"{USER}Add.\n\n1 and 2{END}\n{ASSISTANT}3{END}\n",
        [f"3{END}"],
    ),
    "dolly": (
        {"instruction": "Who?", "context": "Ann came.", "response": "Ann.", "category": "closed_qa"},
        f"{USER}Who?\n\nAnn came.{END}\n{ASSISTANT}Ann.{END}\n",
        [f"Ann.{END}"],
    ),
    "flan": (
        {"inputs": "2 + 2 =", "targets": "4", "task": "sums"},
        f"{USER}2 + 2 ={END}\n{ASSISTANT}4{END}\n",
        [f"4{END}"],
    ),
    "prompt_completion": (
        {"prompt": "Once", "completion": "upon a time"},
        f"{USER}Once{END}\n{ASSISTANT}upon a time{END}\n",
        [f"upon a time{END}"],
    ),
    "prompt_response": (
        {"prompt": "Hi", "response": "Ho"},
        f"{USER}Hi{END}\n{ASSISTANT}Ho{END}\n",
        [f"Ho{END}"],
    ),
    "guanaco": (
        {"text": "### Human: Hi, you.### Assistant: Hello.\n## A list### Human: More?### Assistant: No."},
        f"{USER}Hi, you.{END}\n{ASSISTANT}Hello.\n## A list{END}\n{USER}More?{END}\n{ASSISTANT}No.{END}\n",
        [f"Hello.\n## A list{END}", f"No.{END}"],
    ),
    "messages": (
        {
            "messages": [
                message("system", "Be brief."),
                message("user", "One?"),
                message("assistant", "1"),
                message("user", "Two?"),
                message("assistant", "2"),
            ]
        },
        f"<|im_start|>system\nBe brief.{END}\n{USER}One?{END}\n{ASSISTANT}1{END}\n"
        f"{USER}Two?{END}\n{ASSISTANT}2{END}\n",
        [f"1{END}", f"2{END}"],
    ),
    "parts_and_weights": (
        {
            "messages": [
                message("user", [{"type": "text", "value": "One?"}], loss_weight=0.0),
                message("assistant", [{"type": "text", "value": "1"}], loss_weight=0.0),
                message("user", [{"type": "text", "value": "Two"}, {"type": "text", "text": "?"}]),
                message("assistant", [{"type": "text", "value": "2"}], loss_weight=1.0),
            ]
        },
        f"{USER}One?{END}\n{ASSISTANT}1{END}\n{USER}Two?{END}\n{ASSISTANT}2{END}\n",
        [f"2{END}"],
    ),
    "sharegpt": (
        {
            "id": "x_1",
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "gpt", "value": "(the end of an earlier piece)"},
                {"from": "human", "value": "One?"},
                {"from": "gpt", "value": "1"},
                {"from": "human", "value": "Two?"},
                {"from": "gpt", "value": "2"},
            ],
        },
        f"<|im_start|>system\nBe brief.{END}\n{USER}One?{END}\n{ASSISTANT}1{END}\n"
        f"{USER}Two?{END}\n{ASSISTANT}2{END}\n",
        [f"1{END}", f"2{END}"],
    ),
}


def ready(module, tokenizer):
    module.connect(tokenizer)
    module.prepare_data()
    module.setup("fit")
    return module


def read_back(row, tokenizer):
    """The whole text of an encoded row, and its trained stretches."""
    stretches, inside = [], False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (IGNORE_INDEX, token)
        if label != IGNORE_INDEX:
            stretches = [*stretches[:-1], [*stretches[-1], token]] if inside else [*stretches, [token]]
        inside = label != IGNORE_INDEX
    return tokenizer.decode(row["input_ids"]), [tokenizer.decode(tokens) for tokens in stretches]


def test_trained_tokens_of_every_form(tiny_tokenizer, write_jsonl):
    # One file: which form a record has is told record by record.
    path = write_jsonl("all.jsonl", [record for record, _, _ in FORMS.values()])
    rows = ready(InstructionData(path, validation_share=0), tiny_tokenizer)._encoded["train"].rows
    for row, (_, text, trained) in zip(rows, FORMS.values(), strict=True):
        assert read_back(row, tiny_tokenizer) == (text, trained)


def test_trained_tokens_under_the_alpaca_prompt(tiny_tokenizer, write_jsonl):
    forms = ("alpaca", "dolly", "flan", "prompt_completion")
    path = write_jsonl("a.jsonl", [FORMS[form][0] for form in forms])
    module = ready(InstructionData(path, prompt="alpaca", validation_share=0), tiny_tokenizer)
    for form, row in zip(forms, module._encoded["train"].rows, strict=True):
        text, trained = read_back(row, tiny_tokenizer)
        assert trained == FORMS[form][2]
        assert text.startswith("Below is an instruction")
        assert ("### Input:" in text) == (form in ("alpaca", "dolly"))


def test_empty_columns_of_other_forms_do_not_count():
    empty = dict.fromkeys(
        ["messages", "conversations", "text", "instruction", "output", "prompt", "response"]
    )
    row = parse_instruction({**empty, "inputs": "a", "targets": "b"})
    assert (row["instruction"], row["output"]) == ("a", "b")
    row = parse_instruction({**empty, "instruction": "a", "response": "b"})
    assert (row["instruction"], row["output"]) == ("a", "b")


def test_pieces_without_an_answer_are_counted_as_dropped(tiny_tokenizer, write_jsonl):
    good = FORMS["sharegpt"][0]
    empty = {"conversations": []}
    asked = {"conversations": [{"from": "human", "value": "Is anybody there?"}]}
    path = write_jsonl("a.jsonl", [good, empty, asked])
    report = ready(InstructionData(path, validation_share=0), tiny_tokenizer).report["train"]
    assert (report.read, report.kept, report.dropped) == (3, 1, 2)


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        (
            {"question": "a", "reply": "b"},
            ["no format matches these fields: question, reply.", "instruction, input, output", "`columns`"],
        ),
        ({"prompt": "a", "reply": "b"}, ["'completion' is missing; found: prompt, reply."]),
        ({"inputs": "a", "targets": 3}, ["'targets' must be text, found int 3"]),
        ({"text": "No turns here."}, ["'text' does not begin with '### Human:'"]),
        ({"text": "### Human: Hi"}, ["no assistant message"]),
        ({"text": "### Human: Hi", "instruction": "x"}, ["'output' is missing"]),
        ({"conversations": "x"}, ["'conversations' must be a list of turns, found str 'x'"]),
        ({"conversations": ["x"]}, ["'conversations[0]' must be an object with from and value"]),
        ({"conversations": [{"from": "human"}]}, ["'conversations[0].value' is missing; found: from"]),
        ({"conversations": [{"from": "alien", "value": "x"}]}, ["is 'alien'; known speakers are human"]),
        ({"conversations": [{"from": "human", "value": 3}]}, ["'conversations[0].content' must be text"]),
    ],
)
def test_wrong_records(record, parts):
    with pytest.raises(DataError) as caught:
        parse_record(parse_instruction, record, "f.jsonl, line 3")
    assert str(caught.value).startswith("f.jsonl, line 3: ")
    for part in parts:
        assert part in str(caught.value)


def test_own_columns(tiny_tokenizer, tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([["frage", "antwort", "output"], ["Wer?", "Anna", "not this"]])
    columns = {"instruction": "frage", "output": "antwort"}
    module = ready(InstructionData(path, columns=columns, validation_share=0), tiny_tokenizer)
    row = module._encoded["train"].rows[0]
    assert read_back(row, tiny_tokenizer) == (f"{USER}Wer?{END}\n{ASSISTANT}Anna{END}\n", [f"Anna{END}"])
    with pytest.raises(
        DataError, match=r"a\.csv, line 2: column 'reply' .*'output' in `columns`.*frage, antw"
    ):
        ready(InstructionData(path, columns={"instruction": "frage", "output": "reply"}), tiny_tokenizer)
    with pytest.raises(DataError, match=r"has an unknown field 'outptu'.*instruction"):
        InstructionData(path, columns={"outptu": "antwort"})
    with pytest.raises(DataError, match="'output' to the name of a column, found ''"):
        InstructionData(path, columns={"output": ""})


def test_folder_of_files(tiny_tokenizer, tmp_path, write_jsonl):
    from pyarrow import Table, parquet

    records = [{"instruction": f"Say {n}.", "output": f"{n}"} for n in range(9)]
    write_jsonl("corpus/part1.jsonl", records[:2])
    (tmp_path / "corpus" / "more").mkdir()
    (tmp_path / "corpus" / "more" / "part2.json").write_text(json.dumps(records[2:4]))
    parquet.write_table(Table.from_pylist(records[4:5]), tmp_path / "corpus" / "part3.parquet")
    for name in ("README.txt", "dataset_infos.json", ".hidden.jsonl"):
        (tmp_path / "corpus" / name).write_text("no data")
    module = ready(InstructionData(tmp_path / "corpus", validation_share=0.2), tiny_tokenizer)
    assert (module.report["train"].read, module.report["validation"].read) == (4, 1)
    # Named for their parts, as a downloaded hub data set is.
    write_jsonl("corpus/validation-00000-of-00001.jsonl", records[5:8])
    write_jsonl("corpus/test/0.jsonl", records[8:])
    module = ready(InstructionData(tmp_path / "corpus"), tiny_tokenizer)
    assert (module.report["train"].read, module.report["validation"].read) == (5, 3)
    module = ready(InstructionData(tmp_path / "corpus", validation_share=0), tiny_tokenizer)
    assert module.report.keys() == {"train"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no data files \(\.json"):
        ready(InstructionData(tmp_path / "empty"), tiny_tokenizer)


HUB = {
    "alpaca": ("tatsu-lab/alpaca", "train", {}, "alpaca", None),
    "alpaca_cleaned": ("yahma/alpaca-cleaned", "train", {}, "alpaca", None),
    "dolly": ("databricks/databricks-dolly-15k", "train", {}, "alpaca", None),
    "flan": ("Muennighoff/flan", "train", {}, "alpaca", "validation"),
    "guanaco": ("timdettmers/openassistant-guanaco", "train", {}, "chat", "test"),
    "oasst1": ("OpenAssistant/oasst1", "train", {}, "chat", "validation"),
    "sharegpt": (
        "anon8231489123/ShareGPT_Vicuna_unfiltered",
        "train",
        {"data_files": "ShareGPT_V3_unfiltered_cleaned_split.json"},
        "chat",
        None,
    ),
    "ultrachat": ("HuggingFaceH4/ultrachat_200k", "train_sft", {}, "chat", "test_sft"),
}


@pytest.fixture
def hub(monkeypatch):
    """A hub that serves 40 equal records of the right form, and remembers what it was asked for."""
    import datasets

    asked = []
    forms = {
        "yahma/alpaca-cleaned": "alpaca",
        "tatsu-lab/alpaca": "alpaca",
        "databricks/databricks-dolly-15k": "dolly",
        "Muennighoff/flan": "flan",
        "timdettmers/openassistant-guanaco": "guanaco",
        "anon8231489123/ShareGPT_Vicuna_unfiltered": "sharegpt",
        "HuggingFaceH4/ultrachat_200k": "messages",
    }

    def load(name, split, **options):
        asked.append((name, split, options))
        if name == "OpenAssistant/oasst1":
            return datasets.Dataset.from_list(TREE)
        record = json.dumps(FORMS[forms[name]][0])
        answers = ("3", "Ann.", "4", "No.", "1")  # made different, so that some can be held out
        answer = next(answer for answer in answers if f'{answer}"' in record)
        rows = [json.loads(record.replace(f'{answer}"', f'{answer}{n}"')) for n in range(40)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize("name", HUB)
@pytest.mark.filterwarnings("ignore:.*evaluation items are also")
def test_named_corpora(tiny_tokenizer, hub, name):
    source, split, options, prompt, held = HUB[name]
    module = ready(InstructionData(name), tiny_tokenizer)
    assert module.prompt == prompt
    assert (source, split, options) in hub
    assert {asked[1] for asked in hub} == {split, held} - {None}
    assert module.report["train"].kept > 0
    assert module.report["validation"].kept > 0
    assert InstructionData(source).prompt == prompt
    assert InstructionData(source)._shards("train") == module._shards("train")


@pytest.mark.filterwarnings("ignore:.*evaluation items are also")
def test_names_and_options_of_corpora(tiny_tokenizer, hub, tmp_path, monkeypatch):
    assert InstructionData("Alpaca-Cleaned").prompt == "alpaca"
    assert InstructionData("alpaca", prompt="chat").prompt == "chat"
    assert InstructionData(["alpaca", "dolly"]).prompt == "alpaca"
    assert InstructionData(["alpaca", "guanaco"]).prompt == "chat"
    assert InstructionData(["alpaca", "own.jsonl"]).prompt == "chat"
    module = ready(InstructionData(["alpaca", "dolly"], validation_share=0.1), tiny_tokenizer)
    assert module.report["train"].read + module.report["validation"].read == 80
    ready(InstructionData("ultrachat", split="train_gen"), tiny_tokenizer)
    assert ("HuggingFaceH4/ultrachat_200k", "train_gen", {}) in hub
    # A folder of that name is taken rather than the hub.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dolly").mkdir()
    with pytest.raises(DataError, match="dolly has no data files"):
        ready(InstructionData("dolly"), tiny_tokenizer)


def node(name, parent, role, text, **more):
    return {"message_id": name, "parent_id": parent, "role": role, "text": text, "lang": "en", **more}


TREE = [
    node("q", None, "prompter", "Why?", rank=None, deleted=False),
    node("a2", "q", "assistant", "Worse.", rank=1, deleted=False),
    node("a1", "q", "assistant", "Because.", rank=0, deleted=False),
    node("a0", "q", "assistant", "Gone.", rank=0, deleted=True),
    node("q2", "a1", "prompter", "And?", rank=0, deleted=False),
    node("b", "q2", "assistant", "Thus.", rank=None, deleted=False),
    node("q3", "b", "prompter", "Thanks", rank=None, deleted=False),
    {**node("f", None, "prompter", "Pourquoi ?", rank=None, deleted=False), "lang": "fr"},
    {**node("g", "f", "assistant", "Parce que.", rank=0, deleted=False), "lang": "fr"},
]


def chats(tokenizer, path, **options):
    rows = ready(InstructionData(path, validation_share=0, **options), tokenizer)._encoded["train"].rows
    return [read_back(row, tokenizer) for row in rows]


def test_message_trees(tiny_tokenizer, write_jsonl):
    path = write_jsonl("oasst.jsonl", TREE)
    best = (
        f"{USER}Why?{END}\n{ASSISTANT}Because.{END}\n{USER}And?{END}\n{ASSISTANT}Thus.{END}\n",
        [f"Because.{END}", f"Thus.{END}"],
    )
    worse = (f"{USER}Why?{END}\n{ASSISTANT}Worse.{END}\n", [f"Worse.{END}"])
    french = (f"{USER}Pourquoi ?{END}\n{ASSISTANT}Parce que.{END}\n", [f"Parce que.{END}"])
    assert chats(tiny_tokenizer, path) == [best]
    assert chats(tiny_tokenizer, path, tree_paths="all") == [best, worse]
    assert chats(tiny_tokenizer, path, tree_language=None) == [best, french]
    with pytest.raises(DataError, match=r"no tree in the language 'de'; found: en, fr. Change `tree_lang"):
        chats(tiny_tokenizer, path, tree_language="de")
    with pytest.raises(DataError, match="tree_paths must be 'best' or 'all'"):
        InstructionData(path, tree_paths="some")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"parent_id": "nobody"}, "line 3: field 'parent_id' names 'nobody', but there is no such message"),
        ({"role": "bot"}, "line 3: field 'role' is 'bot'; known roles of message trees are prompter"),
        ({"text": None}, "line 3: field 'text' must be text, found None"),
    ],
)
def test_wrong_trees(tiny_tokenizer, write_jsonl, change, part):
    path = write_jsonl("oasst.jsonl", [*TREE[:2], TREE[2] | change])
    with pytest.raises(DataError, match=part):
        chats(tiny_tokenizer, path)


def test_tree_message_without_a_field(tiny_tokenizer, write_jsonl):
    path = write_jsonl("oasst.jsonl", [*TREE[:2], {"message_id": "x", "text": "y"}])
    with pytest.raises(
        DataError, match="line 3: field 'parent_id' of a message tree is missing; found: mess"
    ):
        chats(tiny_tokenizer, path)


def test_items_that_are_trained_and_held_out_are_counted(tiny_tokenizer, write_jsonl):
    train = write_jsonl("a.jsonl", [{"instruction": f"Say {n}.", "output": f"{n}"} for n in range(6)])
    held = write_jsonl("b.jsonl", [{"prompt": f"say  {n}.", "completion": f"{n}"} for n in (9, 4, 5)])
    with pytest.warns(
        UserWarning, match=r"instruction: 2 of 3 evaluation items .*b\.jsonl, line 2, .*line 5\)"
    ):
        ready(InstructionData(train, validation_path=held), tiny_tokenizer)
