import pytest

from moka_pl.data.formats.choice import parse_choice
from moka_pl.data.formats.llm_adapters import LLM_ADAPTERS
from moka_pl.data.reading import parse_record
from moka_pl.errors import DataError

# Questions of our own in the eight tasks' forms.
FORMS = {
    "boolq": (
        "Please answer the following question with true or false, question: is ice: a solid?\n\n"
        "Answer format: true/false",
        "true",
        ("is ice: a solid?", ["true", "false"], 0),
    ),
    "piqa": (
        "Please choose the correct solution to the question: Open a jar.\n\nSolution1: Turn the lid.\n\n"
        "Solution2: Shake it, then wait.\n\nAnswer format: solution1/solution2",
        "solution2",
        ("Open a jar.", ["Turn the lid.", "Shake it, then wait."], 1),
    ),
    "siqa": (
        "Please choose the correct answer to the question: Kim won. How does Kim feel?\n\n"
        "Answer1: glad Answer2: sad Answer3: tired\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
        ("Kim won. How does Kim feel?", ["glad", "sad", "tired"], 0),
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Baking bread: A man kneads. "
        "then\n\nEnding1: , he waits. Ending2: he flies. Ending3: he sings [title] x. Ending4: he is: "
        "done.\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending4",
        (
            "Baking bread: A man kneads. then",
            [", he waits.", "he flies.", "he sings [title] x.", "he is: done."],
            3,
        ),
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: The cup was "
        "in the box until _ broke.\n\nOption1: cup Option2: box Answer format: option1/option2",
        "option1",
        ("The cup was in the box until _ broke.", ["cup", "box"], 0),
    ),
    "arc_easy": (
        "Please choose the correct answer to the question: What melts?\n\nAnswer1: ice Answer2: air Answer3: "
        "light\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
        ("What melts?", ["ice", "air", "light"], 0),
    ),
    "arc_challenge": (
        "Please choose the correct answer to the question: Which is largest?\n\nAnswer1: a Answer2: b "
        "Answer3: c Answer4: d Answer5: e\n\nAnswer format: answer1/answer2/answer3/answer4/answer5",
        "answer5",
        ("Which is largest?", ["a", "b", "c", "d", "e"], 4),
    ),
    "openbookqa": (
        "Please choose the correct answer to the question: Plants need\n\nAnswer1: light Answer2: noise "
        "Answer3: plastic Answer4: smoke\n\nAnswer format: answer1/answer2/answer3/answer4",
        "answer1",
        ("Plants need", ["light", "noise", "plastic", "smoke"], 0),
    ),
}


def common(**changes):
    return {"task": "t", "question": "Why?", "choices": ["a", "b"], "answer": 1} | changes


@pytest.mark.parametrize("task", FORMS)
def test_all_eight_forms(task):
    instruction, answer, expected = FORMS[task]
    record = {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }
    assert LLM_ADAPTERS.parse(record)[:3] == expected
    row = parse_choice(record, task)
    question, choices, right = expected
    choices = [choice.replace(" [title]", ".") for choice in choices]
    assert (row["task"], row["question"], row["choices"], row["answer"]) == (task, question, choices, right)


def test_common_form():
    assert parse_choice(common(), "folder") == common()
    assert parse_choice(common(task=None), "folder")["task"] == "folder"


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({"question": "Why?", "answer": 0}, "field 'choices' is missing; found: question, answer"),
        (common(answer=2), "field 'answer' is 2, outside of the 2 choices"),
        (common(answer=-1), "field 'answer' is -1, outside"),
        (common(answer=True), "must be the index"),
        (common(answer="a"), "must be the index"),
        (common(choices=["a", " "]), "choice 2 of 2 is empty"),
        (common(choices=["a"]), "1 choice"),
        (common(choices="ab"), "must be a list of texts"),
        (common(question=" "), "field 'question' must be text"),
        (common(task=3), "field 'task' must be a name"),
        ({"instruction": "x", "answer": 3}, "field 'answer' must be text"),
        ({"instruction": "x"}, "field 'answer' is missing"),
        ({"instruction": "Please choose: x", "answer": "a"}, "does not end in 'Answer format"),
        (
            {"instruction": "Please: x\n\nAnswer1: a\n\nAnswer format: answer1/answer2", "answer": "answer1"},
            "has no 'Answer2:'",
        ),
        (
            {"instruction": FORMS["siqa"][0], "answer": "answer4"},
            "field 'answer' is 'answer4', outside of the options answer1, answer2, answer3",
        ),
        (
            {
                "instruction": "Please: x\n\nAnswer1: Answer2: b\n\nAnswer format: answer1/answer2",
                "answer": "answer1",
            },
            "choice 1 of 2 is empty",
        ),
    ],
)
def test_wrong_records(record, part):
    with pytest.raises(DataError) as caught:
        parse_record(parse_choice, record, "f.json, item 3", "t")
    assert str(caught.value).startswith("f.json, item 3: ")
    assert part in str(caught.value)
