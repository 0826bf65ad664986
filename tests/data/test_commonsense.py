import json

import pytest

from moka_pl.data import CommonsenseData, DataError
from moka_pl.lm.scoring import IGNORE_INDEX


def record(n, task="t"):
    return {"task": task, "question": f"Which is {n}?", "choices": [f"{n}", "none", "both"], "answer": n % 3}


def llm_record(n):
    return {
        "instruction": f"Please choose the correct answer to the question: Which is {n}?\n\nAnswer1: {n} "
        "Answer2: none\n\nAnswer format: answer1/answer2",
        "input": "",
        "output": "the correct answer is answer1",
        "answer": "answer1",
    }


@pytest.fixture
def folder(tmp_path):
    for task, count in (("physics", 6), ("biology", 4)):
        for part in ("train", "test"):
            path = tmp_path / "tasks" / task / f"{part}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps([llm_record(n) for n in range(count)]))
    return tmp_path / "tasks"


def ready(module, tokenizer):
    module.connect(tokenizer)
    module.prepare_data()
    module.setup()
    return module


def test_sample(tiny_tokenizer):
    module = ready(CommonsenseData(batch_size=4), tiny_tokenizer)
    assert (module.report["train"].read, module.report["validation"].read) == (224, 80)
    assert len(module.tasks) == 8
    assert module.eval_sets == [("commonsense", module.tasks)]
    batch = next(iter(module.val_dataloader()))
    assert batch["item"].max() == 3
    assert batch["is_answer"].sum() == 4


def test_training_rows_and_items_share_their_tokens(tiny_tokenizer, write_jsonl):
    path = write_jsonl("x/train.jsonl", [record(n) for n in range(4)])
    module = ready(CommonsenseData(path, validation_path=path), tiny_tokenizer)
    for row, item in zip(module._encoded["train"].rows, module._encoded["validation"].rows, strict=True):
        right = item["option_ids"][item["answer"]]
        assert row["input_ids"] == [*item["prompt_ids"], *right, tiny_tokenizer.eos_token_id]
        assert [t for t in row["labels"] if t != IGNORE_INDEX] == [*right, tiny_tokenizer.eos_token_id]


def test_folder_of_tasks(tiny_tokenizer, folder):
    module = ready(CommonsenseData(folder), tiny_tokenizer)
    assert module.tasks == ["biology", "physics"]
    assert module.report["train"].read == 10
    assert module._encoded["test"].rows["task"][:] == [0] * 4 + [1] * 6


def test_tasks_are_selected_and_ordered(tiny_tokenizer, folder, write_jsonl):
    module = ready(CommonsenseData(str(folder), tasks=["physics", "biology"]), tiny_tokenizer)
    assert module._encoded["test"].rows["task"][:] == [1] * 4 + [0] * 6
    module = ready(CommonsenseData(folder, tasks=["physics"]), tiny_tokenizer)
    assert module.report["train"].read == 6
    path = write_jsonl("x/all.jsonl", [record(n, "ab"[n % 2]) for n in range(8)])
    module = ready(CommonsenseData(path, path, tasks=["b"]), tiny_tokenizer)
    assert (module.report["train"].read, module.tasks) == (4, ["b"])
    for source in (folder, path):
        with pytest.raises(DataError, match=r"has no task 'nope'; it has: .*Correct `tasks`"):
            ready(CommonsenseData(source, tasks=["nope"]), tiny_tokenizer)


def test_one_file_of_a_task(tiny_tokenizer, folder):
    module = ready(CommonsenseData(folder / "physics" / "train.json", validation_share=0.34), tiny_tokenizer)
    assert module.tasks == ["physics"]
    assert (module.report["train"].read, module.report["validation"].read) == (4, 2)
    module = ready(CommonsenseData(folder / "physics" / "train.json", validation_share=0), tiny_tokenizer)
    assert module.val_dataloader() == []
    assert module.tasks == []


def test_the_file_that_lacks_a_task_is_named(tiny_tokenizer, write_jsonl):
    full = write_jsonl("full.jsonl", [record(n, "ab"[n % 2]) for n in range(8)])
    poor = write_jsonl("poor.jsonl", [record(n, "a") for n in range(4)])
    for path, validation_path, split in ((full, poor, "validation"), (poor, full, "train")):
        with pytest.raises(DataError, match=rf"poor\.jsonl \({split}\) has no task 'b'; it has: a\."):
            ready(CommonsenseData(path, validation_path, tasks=["a", "b"]), tiny_tokenizer)


def test_limit_is_per_task_and_spares_the_test(tiny_tokenizer, folder):
    module = ready(CommonsenseData(folder, validation_limit=3), tiny_tokenizer)
    assert module._encoded["validation"].rows["task"][:] == [0] * 3 + [1] * 3
    assert module.report["test"].read == 10
    with pytest.raises(DataError, match="validation_limit must be at least 1"):
        CommonsenseData(validation_limit=0)


def test_incomplete_folders(tiny_tokenizer, folder, tmp_path):
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"no train\.json in empty"):
        ready(CommonsenseData(folder), tiny_tokenizer)
    with pytest.raises(DataError, match=r"is empty\. Give a folder"):
        ready(CommonsenseData(folder / "empty"), tiny_tokenizer)


def test_errors_name_the_item(tiny_tokenizer, folder):
    path = folder / "physics" / "test.json"
    path.write_text(json.dumps([llm_record(0), llm_record(1) | {"answer": "answer3"}]))
    with pytest.raises(DataError, match=r"test\.json, item 2: field 'answer' is 'answer3'"):
        ready(CommonsenseData(folder), tiny_tokenizer)
