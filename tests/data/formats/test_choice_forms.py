"""The eight commonsense tasks: the hub's columns and the LLM-Adapters form give the same items."""

import json

import pytest

from moka_pl.data import CommonsenseData, DataError
from moka_pl.data.catalog import CHOICE_TASKS, fill_blank, task_name
from moka_pl.data.formats.choice import parse_choice
from moka_pl.data.formats.hub_tasks import hub_task
from moka_pl.data.reading import parse_record
from moka_pl.lm.scoring import IGNORE_INDEX

QUESTION = "Please choose the correct answer to the question: "


def listed(word, options):
    return " ".join(f"{word}{number}: {option}" for number, option in enumerate(options, start=1))


def answers(question, options):
    names = "/".join(f"answer{number}" for number in range(1, len(options) + 1))
    return f"{QUESTION}{question}\n\n{listed('Answer', options)}\n\nAnswer format: {names}"


def keyed(texts, labels="ABCDE"):
    return {"text": texts, "label": list(labels[: len(texts)])}


# Records of our own in both forms, and the item that both give.
TASKS = {
    "boolq": (
        {"question": "can a cat bark", "answer": False, "passage": "Cats meow."},
        "Please answer the following question with true or false, question: can a cat bark?\n\n"
        "Answer format: true/false",
        "false",
        ("can a cat bark?", ["true", "false"], 1),
    ),
    "piqa": (
        {"goal": "Open a jar.", "sol1": "Turn the lid. ", "sol2": "Shake it.", "label": 1},
        "Please choose the correct solution to the question: Open a jar.\n\nSolution1: Turn the lid. \n\n"
        "Solution2: Shake it.\n\nAnswer format: solution1/solution2",
        "solution2",
        ("Open a jar.", ["Turn the lid.", "Shake it."], 1),
    ),
    "siqa": (
        {
            "context": "Kim won the race.",
            "question": "How would Kim feel afterwards?",
            "answerA": "glad",
            "answerB": "sad",
            "answerC": "lost\n",
            "label": "1",
        },
        answers("Kim won the race. How would Kim feel afterwards?", ["glad", "sad", "lost\n"]),
        "answer1",
        ("Kim won the race. How would Kim feel afterwards?", ["glad", "sad", "lost"], 0),
    ),
    "hellaswag": (
        {
            "ind": 3,
            "activity_label": "Home",
            "ctx_a": "[header] How to bake [title] Mix the dough. [step] Use a bowl.",
            "ctx_b": "then",
            "ctx": "[header] How to bake [title] Mix the dough. [step] Use a bowl. then",
            "endings": ["wait [substeps] one hour.", ", he sings.", "sleep [title] Eat.", "run."],
            "source_id": "x",
            "split": "train",
            "label": "2",
        },
        "Please choose the correct ending to complete the given sentence: Home: [header] How to bake [title] "
        "Mix the dough. [step] Use a bowl. then\n\n"
        + listed("Ending", ["wait [substeps] one hour.", ", he sings.", "sleep [title] Eat.", "run."])
        + "\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending3",
        (
            "Home: How to bake. Mix the dough. Use a bowl. then",
            ["wait one hour.", ", he sings.", "sleep. Eat.", "run."],
            2,
        ),
    ),
    "winogrande": (
        {
            "sentence": "The cup was in the box until _ broke.",
            "option1": "the cup",
            "option2": "the box",
            "answer": "2",
        },
        "Please choose the correct answer to fill in the blank to complete the given sentence: The cup was "
        "in the box until _ broke.\n\nOption1: the cup Option2: the box Answer format: option1/option2",
        "option2",
        ("The cup was in the box until _ broke.", ["the cup", "the box"], 1),
    ),
    "arc_easy": (
        {
            "id": "x",
            "question": "What melts?",
            "choices": keyed(["ice", "air", "light"], "123"),
            "answerKey": "1",
        },
        answers("What melts?", ["ice", "air", "light"]),
        "answer1",
        ("What melts?", ["ice", "air", "light"], 0),
    ),
    "arc_challenge": (
        {"id": "y", "question": "Which is largest?", "choices": keyed(list("abcde")), "answerKey": "E"},
        answers("Which is largest?", list("abcde")),
        "answer5",
        ("Which is largest?", list("abcde"), 4),
    ),
    "openbookqa": (
        {
            "id": "z",
            "question_stem": "Plants need",
            "choices": keyed(["light", "noise", "tin", "smoke"]),
            "answerKey": "A",
        },
        answers("Plants need", ["light", "noise", "tin", "smoke"]),
        "answer1",
        ("Plants need", ["light", "noise", "tin", "smoke"], 0),
    ),
}


def llm_adapters(task):
    _, instruction, answer, _ = TASKS[task]
    output = f"the correct answer is {answer}"
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


@pytest.fixture
def hub(monkeypatch):
    """A hub that serves twenty versions of each task's record, and remembers what it was asked for."""
    import datasets

    asked = []

    def load(name, config=None, *, split, **options):
        options |= {"name": config} if config else {}
        asked.append((name, split, options))
        if name == "zwhe99/commonsense_170k":
            return datasets.Dataset.from_list([llm_adapters(task) for task in TASKS] * 3)
        (task,) = [t for t in CHOICE_TASKS.values() if t.hub == name and t.options.get("name") == config]
        return datasets.Dataset.from_list([TASKS[task.name][0]] * 2)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def ready(module, tokenizer):
    module.connect(tokenizer)
    module.prepare_data()
    module.setup()
    return module


@pytest.mark.parametrize("task", TASKS)
def test_both_forms_give_the_same_item(task):
    original, _, _, (question, choices, answer) = TASKS[task]
    item = {"task": task, "question": question, "choices": choices, "answer": answer}
    assert parse_choice(original, task) == item
    assert parse_choice(llm_adapters(task), task) == item


def test_hub_columns_tell_the_task():
    for task, (original, *_) in TASKS.items():
        assert hub_task(original) == ("arc" if task.startswith("arc") else task)
        expected = "folder" if task.startswith("arc") else task
        assert parse_choice(original, "folder")["task"] == expected
    assert hub_task({"question": "x", "choices": ["a", "b"], "answer": 0}) is None


def test_numbers_and_truth_values_as_text():
    assert parse_choice(TASKS["boolq"][0] | {"answer": "False"}, "boolq")["answer"] == 1
    assert parse_choice(TASKS["piqa"][0] | {"label": "1"}, "piqa")["answer"] == 1
    objects = [{"text": "ice", "label": "A"}, {"text": "air", "label": "B"}]
    record = TASKS["arc_easy"][0] | {"choices": objects, "answerKey": "B"}
    assert parse_choice(record, "arc_easy")["choices"] == ["ice", "air"]
    record = {"question": "q", "choices": '["a", "b"]', "answer": "1"}
    assert parse_choice(record, "t")["answer"] == 1
    assert parse_choice(record | {"answer": "B"}, "t")["answer"] == 1


@pytest.mark.parametrize(
    ("task", "change", "part"),
    [
        ("boolq", {"answer": "maybe"}, "'answer' of boolq must be true or false, found 'maybe'"),
        ("boolq", {"question": 3}, "'question' must be text, found int 3"),
        ("piqa", {"label": -1}, "'label' is -1, outside of the options 0, 1. Splits without labels"),
        ("piqa", {"sol2": " "}, "choice 2 of 2 is empty"),
        ("piqa", {"sol1": None}, "'sol1' of piqa is empty"),
        ("piqa", {"sol1": 3}, "'choices' must be a list of texts"),
        ("siqa", {"label": "4"}, "'label' is '4', outside of the options 1, 2, 3"),
        ("hellaswag", {"label": ""}, "'label' is '', outside of the options 0, 1, 2, 3. Splits without"),
        ("hellaswag", {"endings": "x"}, "'endings' must be a list of texts"),
        ("hellaswag", {"endings": ["a", "[title]", "c", "d"]}, "choice 2 of 4 is empty"),
        ("winogrande", {"answer": "3"}, "'answer' is '3', outside of the options 1, 2"),
        ("winogrande", {"sentence": "No blank."}, "'sentence' has no blank '_'"),
        ("arc_easy", {"answerKey": "D"}, "'answerKey' is 'D', outside of the options 1, 2, 3"),
        ("arc_easy", {"choices": keyed(["a"]) | {"label": []}}, "'choices' must hold 'text' and 'label'"),
    ],
)
def test_wrong_originals(task, change, part):
    with pytest.raises(DataError) as caught:
        parse_record(parse_choice, TASKS[task][0] | change, "f.jsonl, line 2", task)
    assert str(caught.value).startswith("f.jsonl, line 2: ")
    assert part in str(caught.value)


def test_names_of_tasks():
    assert [task_name(name) for name in ("ARC-Easy", "arc_c", "social_i_qa", "obqa", "WinoGrande")] == [
        "arc_easy",
        "arc_challenge",
        "siqa",
        "openbookqa",
        "winogrande",
    ]
    assert task_name("My task") == "My task"


def test_blanks_are_filled():
    question, choices = TASKS["winogrande"][3][:2]
    assert fill_blank(question, choices) == (
        "The cup was in the box until",
        ["the cup broke.", "the box broke."],
    )
    assert fill_blank("No blank.", choices) == ("No blank.", choices)
    assert fill_blank("_ broke.", choices) == ("_ broke.", choices)


def items(module, split, tokenizer):
    """Task, prompt, options and answer of every encoded item, read back from its tokens."""
    rows = module._encoded[split].rows
    return [
        (
            module.tasks[row["task"]],
            tokenizer.decode(row["prompt_ids"]),
            [tokenizer.decode(ids).strip() for ids in row["option_ids"]],
            row["answer"],
        )
        for row in rows
    ]


def told(task):
    """What a task is called in a file that mixes tasks; that of ARC-Easy here has three options."""
    names = {"arc_easy": "siqa", "openbookqa": "science", "arc_challenge": "science"}
    return names.get(task, task)


def expected_items(tasks=TASKS, name=str):
    return [(name(t), f"Question: {q}\nAnswer:", o, a) for t in tasks for q, o, a in [TASKS[t][3]]]


def trained_texts(module, tokenizer):
    rows = module._encoded["train"].rows
    return [tokenizer.decode([t for t in labels if t != IGNORE_INDEX]) for labels in rows["labels"]]


@pytest.mark.filterwarnings("ignore:.*evaluation items are also")
def test_all_tasks_on_the_hub(tiny_tokenizer, hub):
    module = CommonsenseData("hub", tasks=["arc_easy", "piqa", "siqa"])
    assert module.eval_sets == [("commonsense", ["arc_easy", "piqa", "siqa"])]
    ready(module, tiny_tokenizer)
    easy, parquet = {"name": "ARC-Easy"}, {"revision": "refs/convert/parquet"}
    assert {(name, split) for name, split, _ in hub} == {
        ("ybisk/piqa", "train"),
        ("ybisk/piqa", "validation"),
        ("allenai/social_i_qa", "train"),
        ("allenai/social_i_qa", "validation"),
        ("allenai/ai2_arc", "train"),
        ("allenai/ai2_arc", "validation"),
        ("allenai/ai2_arc", "test"),
    }
    assert all(options in (easy, parquet) for _, _, options in hub)
    found = items(module, "test", tiny_tokenizer)[::2]
    assert sorted(found) == sorted(expected_items(["arc_easy", "piqa", "siqa"]))
    assert CommonsenseData("hub").tasks == list(CHOICE_TASKS)


@pytest.mark.filterwarnings("ignore:.*evaluation items are also")
@pytest.mark.parametrize("path", ["arc_challenge", "ARC-Challenge"])
def test_one_task_by_name(tiny_tokenizer, hub, path):
    module = ready(CommonsenseData(path), tiny_tokenizer)
    assert set(map(str, hub)) == {
        str(("allenai/ai2_arc", split, {"name": "ARC-Challenge"}))
        for split in ("train", "validation", "test")
    }
    assert items(module, "test", tiny_tokenizer) == expected_items(["arc_challenge"]) * 2
    assert trained_texts(module, tiny_tokenizer) == [" e<|im_end|>"] * 2


def test_hub_ids_and_wrong_tasks(tiny_tokenizer, hub):
    assert CommonsenseData("google/boolq").tasks == ["boolq"]
    assert CommonsenseData("allenai/ai2_arc").tasks == ["arc_easy", "arc_challenge"]
    assert CommonsenseData(["piqa", "obqa"]).tasks == ["piqa", "openbookqa"]
    with pytest.raises(DataError, match="hub has no task 'mmlu'; it has: arc_challenge, arc_easy, boolq"):
        ready(CommonsenseData("hub", tasks=["mmlu"]), tiny_tokenizer)


@pytest.mark.filterwarnings("ignore:.*evaluation items are also")
def test_commonsense_170k(tiny_tokenizer, hub):
    module = CommonsenseData("commonsense_170k", validation_path="hub")
    assert module.tasks == list(CHOICE_TASKS)
    ready(module, tiny_tokenizer)
    assert hub[0] == ("zwhe99/commonsense_170k", "train", {})
    assert module.report["train"].read == 24
    assert items(module, "test", tiny_tokenizer)[::2] == expected_items(CHOICE_TASKS)
    rows = module._split_rows("train")
    assert rows["task"][:8] == [told(task) for task in TASKS]


@pytest.mark.filterwarnings("ignore:.*evaluation items are also")
def test_mixed_file(tiny_tokenizer, tmp_path):
    path = tmp_path / "data" / "commonsense_170k.json"
    path.parent.mkdir()
    path.write_text(json.dumps([llm_adapters(task) for task in TASKS]))
    module = ready(CommonsenseData(path, path), tiny_tokenizer)
    assert items(module, "test", tiny_tokenizer) == expected_items(name=told)
    rights = [options[answer] for _, (_, _, _, (_, options, answer)) in TASKS.items()]
    assert trained_texts(module, tiny_tokenizer) == [f" {right}<|im_end|>" for right in rights]
    module = ready(CommonsenseData(path, path, tasks=["siqa", "science"]), tiny_tokenizer)
    assert module.report["train"].read == 4
    with pytest.raises(DataError, match=r"has no task 'arc_easy'; it has: .*science"):
        ready(CommonsenseData(path, path, tasks=["arc_easy"]), tiny_tokenizer)


def test_files_of_one_task_keep_its_name(tmp_path, write_jsonl):
    # One has three options like the questions of Social IQa.
    records = [llm_adapters("siqa"), llm_adapters("arc_challenge")]
    for name, task in (
        ("physics/train.jsonl", "physics"),
        ("x/arc_easy_test.jsonl", "arc_easy"),
        ("data/ARC-Easy/test.jsonl", "arc_easy"),
    ):
        path = write_jsonl(name, records)
        assert CommonsenseData(path, path).tasks == [task]
    write_jsonl("tasks/biology/train.jsonl", [*records, llm_adapters("boolq")])
    assert CommonsenseData(tmp_path / "tasks", path)._split_rows("train").unique("task") == ["biology"]


def test_folders_of_both_forms_give_the_same_items(tiny_tokenizer, tmp_path, write_jsonl):
    found = []
    for form in (0, 1):
        for task in TASKS:
            record = TASKS[task][0] if form == 0 else llm_adapters(task)
            for part in ("train", "test"):
                write_jsonl(f"{form}/{task}/{part}.jsonl", [record])
        module = CommonsenseData(tmp_path / str(form))
        found.append(
            [module._split_rows("train").remove_columns(["location", "ignored"]).to_list(), module.tasks]
        )
    assert found[0] == found[1]
    assert len(found[0][0]) == 8


def test_hub_download_of_one_task(tmp_path, write_jsonl):
    record = TASKS["arc_easy"][0]
    for part, count in (("train", 3), ("validation", 2), ("test", 1)):
        write_jsonl(f"ARC-Easy/{part}-00000-of-00001.jsonl", [record] * count)
    module = CommonsenseData(tmp_path / "ARC-Easy")
    assert [len(module._split_rows(part)) for part in ("train", "validation", "test")] == [3, 2, 1]
    assert module.tasks == ["arc_easy"]


@pytest.mark.filterwarnings("ignore:.*evaluation items are also")
def test_filled_blanks(tiny_tokenizer, write_jsonl):
    path = write_jsonl("winogrande/train.jsonl", [TASKS["winogrande"][0]])
    module = ready(CommonsenseData(path, path, fill_blank=True), tiny_tokenizer)
    assert items(module, "test", tiny_tokenizer) == [
        (
            "winogrande",
            "Question: The cup was in the box until\nAnswer:",
            ["the cup broke.", "the box broke."],
            1,
        )
    ]
    assert trained_texts(module, tiny_tokenizer) == [" the box broke.<|im_end|>"]


@pytest.mark.filterwarnings("ignore:.*evaluation items are also")
def test_own_columns(tiny_tokenizer, tmp_path):
    path = tmp_path / "quiz" / "a.csv"
    path.parent.mkdir()
    path.write_text("q,a,b,c,key\nWhich?,one,two,three,C\n")
    columns = {"question": "q", "choices": ["a", "b", "c"], "answer": "key"}
    module = ready(CommonsenseData(path, path, columns=columns), tiny_tokenizer)
    assert items(module, "test", tiny_tokenizer) == [
        ("quiz", "Question: Which?\nAnswer:", ["one", "two", "three"], 2)
    ]
    with pytest.raises(DataError, match=r"a\.csv, line 2: column 'd' .*'choices'.* found: q, a, b, c, key"):
        ready(CommonsenseData(path, columns=columns | {"choices": ["a", "d"]}), tiny_tokenizer)


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        ("Q,a,b,0\nQ2,a,b\n", r"a\.csv, line 3: 3 cells, but the header names 4 columns"),
        ("Q,a,b,0\nQ2,a,b,5\n", r"a\.csv, line 3: field 'answer' is 5, outside of the 2 choices"),
        ("Q,a,b,0\nQ2,a,,1\n", r"a\.csv, line 3: choice 2 of 2 is empty"),
        ("Q,a,b,zero\n", r"a\.csv, line 2: field 'answer' must be the index .* found 'zero'"),
        ("Q,a,b,0\nQ\xff,a,b,0\n", r"a\.csv, line 3: byte 0xff at column 2 is not UTF-8"),
    ],
)
def test_bad_rows_of_a_csv(tiny_tokenizer, tmp_path, lines, part):
    path = tmp_path / "a.csv"
    path.write_bytes(b"question,one,two,answer\n" + lines.encode("latin-1"))
    columns = {"question": "question", "choices": ["one", "two"], "answer": "answer"}
    with pytest.raises(DataError, match=part):
        ready(CommonsenseData(path, columns=columns), tiny_tokenizer)


def test_column_of_the_wrong_type(tiny_tokenizer, tmp_path):
    from pyarrow import Table, parquet

    path = tmp_path / "a.parquet"
    rows = [{"question": "Q", "choices": [1, 2], "answer": 0}]
    parquet.write_table(Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 1: field 'choices' must be a list of texts, found"):
        ready(CommonsenseData(path), tiny_tokenizer)


def test_all_too_long(tiny_tokenizer, write_jsonl):
    long = {"question": "Q", "choices": ["word " * 80, "word " * 90], "answer": 0}
    path = write_jsonl("t/a.jsonl", [long] * 3)
    with pytest.raises(DataError, match=r"all 3 examples of commonsense .* dropped: .* max_length=64"):
        ready(CommonsenseData(path, path, max_length=64), tiny_tokenizer)


def test_items_of_train_and_test_are_counted(tiny_tokenizer, write_jsonl, tmp_path):
    same = {"question": "which  is It?", "choices": ["b", "A"], "answer": 1}
    own = [{"question": f"q{n}", "choices": ["a", "b"], "answer": 0} for n in range(3)]
    write_jsonl(
        "t/one/train.jsonl", [own[0], {"question": "Which is it?", "choices": ["a", "b"], "answer": 0}]
    )
    write_jsonl("t/one/test.jsonl", [own[1], own[2], same])
    with pytest.warns(
        UserWarning, match=r"commonsense: 1 of 3 .*test\.jsonl, line 3, .*train\.jsonl, line 2"
    ):
        ready(CommonsenseData(tmp_path / "t"), tiny_tokenizer)
