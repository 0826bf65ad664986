"""Tasks whose answers a rule checks."""

import json
import sys
from types import SimpleNamespace

import pytest

from moka_pl.studies import reasoning
from moka_pl.studies.reasoning import TASKS, is_right, main


@pytest.fixture
def generator(monkeypatch):
    """In the place of reasoning-gym: ten questions, again and again."""

    def create_dataset(task, size, seed, **options):
        assert options == TASKS[task]
        return ({"question": f"{task} {seed}: {i % 10}?\n", "answer": str(i % 10)} for i in range(size))

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))


@pytest.mark.parametrize(
    ("answer", "right", "counts"),
    [
        (" Mother-in-law\n", "mother-in-law", True),
        ("mother", "mother-in-law", False),
        ("+076.0", "76", True),
        ("1,076", "1076", True),
        ("76 ", "-76", False),
        ("The answer is 76.", "76", False),
        ("nan", "nan", True),
        ("", "76", False),
        ("inf", "infinity", False),
    ],
)
def test_an_answer_is_right_as_text_or_as_a_number(answer, right, counts) -> None:
    assert is_right(answer, right) is counts


@pytest.mark.slow
def test_the_rule_is_that_of_the_tasks() -> None:
    gym = pytest.importorskip("reasoning_gym")
    for task, options in TASKS.items():
        data = gym.create_dataset(task, size=20, seed=3, **options)
        items = list(data)
        for item, other in zip(items, items[1:] + items[:1], strict=True):
            right = item["answer"]
            for answer in (right, right.upper(), f"{right}.", f"the {right}", other["answer"], ""):
                assert is_right(answer, right) == (data.score_answer(answer, item) == 1.0), (task, answer)


def test_training_and_test_questions_have_none_in_common(generator, tmp_path, capsys) -> None:
    main(["--out", str(tmp_path), "--tasks", "chain_sum", "--train", "7", "--test", "3", "--seed", "5"])
    rows = [
        [json.loads(line) for line in (tmp_path / "chain_sum" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    ]
    assert [len(part) for part in rows] == [7, 3]
    assert rows[1][0] == {"instruction": "chain_sum 5: 0?", "output": "0"}
    assert len({row["instruction"] for part in rows for row in part}) == 10
    assert "test.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--train", "8"], "chain_sum has 10 different questions, not 11"), (["--test", "0"], "at least 1")],
)
def test_what_cannot_be_written_is_refused(generator, tmp_path, capsys, options, named) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--tasks", "chain_sum", "--train", "7", "--test", "3", *options])
    assert named in capsys.readouterr().err


def test_without_the_package_the_error_names_the_extra(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SystemExit):
        reasoning.main(["--out", str(tmp_path)])
    assert "pip install 'moka_pl[reasoning]'" in capsys.readouterr().err
