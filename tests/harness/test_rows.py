from pathlib import Path

import pytest

from moka_pl.data.errors import DataError
from moka_pl.harness.rows import cloze_splits, mmlu_splits

HEADER = "question,choice0,choice1,choice2,choice3,answer\n"


def test_questions_of_both_forms(questions: Path) -> None:
    files = {
        "test": str(questions / "boolean" / "test.json"),
        "train": str(questions / "physical" / "train.json"),
    }
    rows = cloze_splits("boolean", files, version=1.0)
    assert sorted(rows) == ["test", "train"]
    assert rows["test"][0]["choices"] == ["true", "false"]
    assert rows["test"][0]["question"].endswith("?")
    assert {type(row["answer"]) for row in rows["test"]} == {int}


def test_questions_of_mmlu(mmlu: Path) -> None:
    rows = mmlu_splits("astronomy", {"test": str(mmlu / "test" / "astronomy_test.csv")})["test"]
    assert rows["answer"][:] == [0, 1, 2, 3]
    assert rows[1] == {
        "question": ' test, "1": how many astronomy? ',
        "choices": ["one, or", "two", "3", "four"],
        "answer": 1,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,choice0,choice1,answer\nq,a,b,0\n", "line 2: no column choice2, choice3; found: question"),
        (HEADER + "q,a,b,c,d,4\n", "line 2: field 'answer' must be the index 0 to 3 .* found '4'"),
        (HEADER + "q,a,b,c,d,0\nq,a,,c,d,0\n", "line 3: choice 2 of 4 is empty"),
        (HEADER + ",a,b,c,d,0\n", "line 2: field 'question' must be text that is not empty"),
        (HEADER + "q,a,b,c,0\n", "line 2: 5 cells, but the header names 6 columns"),
    ],
)
def test_rows_of_no_use(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x_test.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rf"x_test\.csv, {message}"):
        mmlu_splits("x", {"test": str(file)})
