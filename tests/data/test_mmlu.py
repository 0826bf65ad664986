import csv

import pytest

from moka_pl.data import CommonsenseData, DataError, MixtureData, MmluData
from moka_pl.data.formats.mmlu import CATEGORIES

HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]


def questions(subject, part, count):
    return [[f" {subject} {part} {n}?\n", f"a{n}", "b, or so", "c", "d", n % 4] for n in range(count)]


def write(folder, subject, part, rows):
    path = folder / part / f"{subject}_{part}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return path


@pytest.fixture
def folder(tmp_path):
    for subject in ("astronomy", "us_foreign_policy", "virology"):
        write(tmp_path / "mmlu", subject, "dev", questions(subject, "dev", 5))
        write(tmp_path / "mmlu", subject, "test", questions(subject, "test", 6))
    return tmp_path / "mmlu"


def ready(data, tokenizer, stage="test"):
    data.connect(tokenizer)
    data.setup(stage)
    return data


def items(data, split="test"):
    return data._encoded[split].rows


def test_five_shot_prompt(tiny_tokenizer, folder):
    data = ready(MmluData(folder), tiny_tokenizer)
    assert data.tasks == ["mmlu_astronomy", "mmlu_us_foreign_policy", "mmlu_virology"]
    item = items(data)[7]  # the second question of the second subject
    prompt = tiny_tokenizer.decode(item["prompt_ids"])
    shots = [
        f"us_foreign_policy dev {n}?\nA. a{n}\nB. b, or so\nC. c\nD. d\nAnswer: {'ABCD'[n % 4]}"
        for n in range(5)
    ]
    asked = "us_foreign_policy test 1?\nA. a1\nB. b, or so\nC. c\nD. d\nAnswer:"
    header = "The following are multiple choice questions (with answers) about us foreign policy."
    assert prompt == "\n\n".join([header, *shots, asked])
    assert [tiny_tokenizer.decode(ids) for ids in item["option_ids"]] == [" A", " B", " C", " D"]
    assert (item["answer"], item["task"]) == (1, 1)


def test_texts_instead_of_letters(tiny_tokenizer, folder):
    data = ready(MmluData(folder, ["virology"], shots=1, scoring="text"), tiny_tokenizer)
    item = items(data)[2]
    assert tiny_tokenizer.decode(item["prompt_ids"]) == (
        "The following are questions (with answers) about virology.\n\n"
        "Question: virology dev 0?\nAnswer: a0\n\nQuestion: virology test 2?\nAnswer:"
    )
    assert [tiny_tokenizer.decode(ids) for ids in item["option_ids"]] == [" a2", " b, or so", " c", " d"]
    assert item["option_chars"] == [2, 8, 1, 1]


def test_no_shots_need_no_dev_split(tiny_tokenizer, folder):
    write(folder, "virology", "dev", questions("virology", "dev", 2))
    data = ready(MmluData(folder, ["virology"], shots=0), tiny_tokenizer)
    prompt = tiny_tokenizer.decode(items(data)[0]["prompt_ids"])
    assert prompt.endswith(
        "(with answers) about virology.\n\nvirology test 0?\nA. a0\nB. b, or so\nC. c\nD. d\nAnswer:"
    )
    with pytest.raises(DataError, match=r"the dev split has 2 questions of virology, fewer than shots \(5\)"):
        ready(MmluData(folder, ["virology"]), tiny_tokenizer)


def test_long_prompts_lose_their_first_shots(tiny_tokenizer, folder):
    full = items(ready(MmluData(folder, ["virology"]), tiny_tokenizer))[0]
    data = ready(MmluData(folder, ["virology"], max_length=full["length"] - 1), tiny_tokenizer)
    prompt = tiny_tokenizer.decode(items(data)[0]["prompt_ids"])
    assert "virology dev 0?" not in prompt
    assert "virology.\n\nvirology dev 1?" in prompt
    report = data.report["test"]
    assert (report.shortened, report.left_out, report.truncated) == (6, 6, 0)
    assert "6 shots dropped from 6 prompts" in str(report)
    # Even without shots it does not fit: then the beginning goes.
    bare = items(ready(MmluData(folder, ["virology"], shots=0), tiny_tokenizer))[0]
    data = ready(MmluData(folder, ["virology"], max_length=bare["length"] - 1), tiny_tokenizer)
    report = data.report["test"]
    assert (report.shortened, report.left_out, report.truncated) == (6, 30, 6)
    assert items(data)[0]["prompt_ids"] == bare["prompt_ids"][1:]


def test_subjects_and_categories(tiny_tokenizer, folder):
    data = MmluData(folder, ["virology", "astronomy"])
    assert data.tasks == ["mmlu_virology", "mmlu_astronomy"]
    assert data.task_groups == {
        "mmlu_stem": ["mmlu_astronomy"],
        "mmlu_other": ["mmlu_virology"],
        "mmlu": ["mmlu_virology", "mmlu_astronomy"],
    }
    assert data.eval_sets == [("mmlu", data.tasks)]
    with pytest.raises(DataError, match=r"has no subject 'alchemy'; it has: astronomy, .*Correct `subjects`"):
        ready(MmluData(folder, ["alchemy"]), tiny_tokenizer)
    sizes = {name: len(subjects) for name, subjects in CATEGORIES.items()}
    assert sizes == {"stem": 19, "humanities": 13, "social_sciences": 12, "other": 13}
    assert len({subject for subjects in CATEGORIES.values() for subject in subjects}) == 57


def test_validation_may_be_a_part(tiny_tokenizer, folder):
    data = ready(MmluData(folder, validation_limit=2), tiny_tokenizer, None)
    assert items(data, "validation")["task"][:] == [0, 0, 1, 1, 2, 2]
    assert len(items(data, "test")) == 18
    assert data._encoded["train"] is None


def test_beside_other_data(tiny_tokenizer, folder):
    mixture = MixtureData([CommonsenseData(validation_limit=2), MmluData(folder, ["virology"], shots=1)])
    ready(mixture, tiny_tokenizer, None)
    assert mixture.prompt == "cloze"
    assert set(mixture.task_groups) == {"mmlu_other", "mmlu"}
    assert [name for name, _ in mixture.eval_sets] == ["commonsense", "mmlu"]
    assert len(mixture.val_dataloader()) == 2


def test_from_the_hub_as_from_files(tiny_tokenizer, folder, monkeypatch):
    import datasets

    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(
            [
                {"question": q, "subject": subject, "choices": list(choices), "answer": answer}
                for subject in ("virology", "astronomy")
                for q, *choices, answer in questions(subject, split, 5 if split == "dev" else 6)
            ]
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub = ready(MmluData(subjects=["astronomy"]), tiny_tokenizer)
    local = ready(MmluData(folder, ["astronomy"]), tiny_tokenizer)
    assert items(hub)[:] == items(local)[:]
    assert asked == [("cais/mmlu", "all", "test"), ("cais/mmlu", "all", "dev")]
    assert MmluData().tasks == ["mmlu_virology", "mmlu_astronomy"]
    with pytest.raises(DataError, match=r"cais/mmlu \(test\) has no subject 'alchemy'"):
        ready(MmluData(subjects=["alchemy"]), tiny_tokenizer)


GOOD = ["q?", "a", "b", "c", "d", "0"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([*GOOD[:5], "4"], r"line 3: field 'answer' is 4, outside of the 4 choices"),
        ([*GOOD[:5], "-1"], r"line 3: field 'answer' is -1, outside of the 4 choices"),
        ([*GOOD[:5], "E"], r"line 3: field 'answer' is 'E'; it must be the number .* 0 to 3, or its letter"),
        ([*GOOD[:5], "1.0"], r"line 3: field 'answer' is '1.0'"),
        (["q?", "a", " ", "c", "d", "0"], r"line 3: choice 2 of 4 is empty"),
        ([" ", *GOOD[1:]], r"line 3: field 'question' must be text that is not empty"),
        (["q?", "a", "b", "c", "0"], r"line 3: 5 cells, but the header names 6 columns"),
        ([*GOOD, "more"], r"line 3: 7 cells, but the header names 6 columns"),
    ],
)
def test_broken_rows(tiny_tokenizer, folder, row, message):
    path = write(folder, "virology", "test", [GOOD, row])
    with pytest.raises(DataError, match=message) as error:
        ready(MmluData(folder, ["virology"]), tiny_tokenizer)
    assert str(path) in str(error.value)


def test_broken_files(tiny_tokenizer, folder, tmp_path):
    path = write(folder, "virology", "test", [GOOD, GOOD])
    path.write_bytes(path.read_bytes().replace(b"q?", b"q\xe9?", 2))
    with pytest.raises(DataError, match=r"virology_test\.csv, line 2: byte 0xe9 .* is not UTF-8"):
        ready(MmluData(folder, ["virology"]), tiny_tokenizer)
    path.write_text("question,A,B,C,D,answer\nq?,a,b,c,d,0\n")
    with pytest.raises(DataError, match=r"line 2: field 'choice0' is missing; found: question, A, B"):
        ready(MmluData(folder, ["virology"]), tiny_tokenizer)
    path.write_text('question,choice0,choice1,choice2,choice3,answer\n"q?,a,b,c,d,0\n')
    with pytest.raises(DataError, match=r"line 2: malformed CSV"):
        ready(MmluData(folder, ["virology"]), tiny_tokenizer)
    (folder / "dev" / "virology_dev.csv").unlink()
    write(folder, "virology", "test", [GOOD])
    with pytest.raises(DataError, match=r"dev has no subject 'virology'"):
        ready(MmluData(folder, ["virology"]), tiny_tokenizer)
    with pytest.raises(DataError, match=r"has no files test/SUBJECT_test\.csv"):
        ready(MmluData(tmp_path), tiny_tokenizer)


def test_hub_columns_of_a_wrong_type(tiny_tokenizer, monkeypatch):
    import datasets

    row = {"question": "q?", "subject": "virology", "choices": ["a", "b", "c", "d"], "answer": 0.5}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list([row]))
    with pytest.raises(DataError, match=r"cais/mmlu \(all, test\), row 1: field 'answer' must be the index"):
        ready(MmluData(), tiny_tokenizer)
    row |= {"answer": 0, "choices": [1, 2, 3, 4]}
    with pytest.raises(DataError, match=r"row 1: field 'choices' must be a list of texts"):
        ready(MmluData(), tiny_tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": -1}, "shots must be at least 0"),
        ({"scoring": "words"}, "scoring must be 'letters' or 'text'"),
        ({"validation_limit": 0}, "validation_limit must be at least 1"),
        ({"subjects": []}, "subjects must be a list of different names"),
        ({"subjects": ["virology", "virology"]}, "subjects must be a list of different names"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(DataError, match=message):
        MmluData(**options)
