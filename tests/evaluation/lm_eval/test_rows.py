import json
from pathlib import Path

import pytest

from moka_pl.errors import DataError
from moka_pl.evaluation.lm_eval.local_data import choice_splits


def test_questions_of_both_forms(questions: Path) -> None:
    files = {
        "test": str(questions / "boolean" / "test.json"),
        "train": str(questions / "physical" / "train.json"),
    }
    rows = choice_splits("boolean", files, version=1.0)
    assert sorted(rows) == ["test", "train"]
    assert rows["test"][0]["choices"] == ["true", "false"]
    assert rows["test"][0]["question"].endswith("?")
    assert {type(row["answer"]) for row in rows["test"]} == {int}


def test_questions_of_mmlu(mmlu: Path) -> None:
    files = {"test": str(mmlu / "test" / "astronomy_test.csv")}
    rows = choice_splits("astronomy", files, mmlu=True)["test"]
    assert rows["answer"][:] == [0, 1, 2, 3]
    assert rows[1] == {
        "question": 'test, "1": how many astronomy?',
        "choices": ["one, or", "two", "3", "four"],
        "answer": 1,
    }


def test_rows_of_no_use(mmlu: Path) -> None:
    file = mmlu / "test" / "astronomy_test.csv"
    file.write_text(file.read_text(encoding="utf-8").replace("two", ""), encoding="utf-8")
    with pytest.raises(DataError, match=r"astronomy_test\.csv, line 2: choice 2 of 4 is empty"):
        choice_splits("astronomy", {"test": str(file)}, mmlu=True)


def test_fields_of_no_use_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("moka_pl.evaluation.lm_eval.local_data.rank_zero_info", said.append)
    record = {"question": "a?", "choices": ["b", "c"], "answer": 0, "hint": "b"}
    (tmp_path / "test.jsonl").write_text(json.dumps(record) + "\n")
    choice_splits("riddles", {"test": str(tmp_path / "test.jsonl")})
    assert said == ["riddles: ignored: hint (1 row)"]
