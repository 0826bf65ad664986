from typing import get_args

import pytest

from moka_pl.data import CommonsenseData, DataError, InstructionData, MixtureData
from moka_pl.data.formats.choice import parse_choice
from moka_pl.lm.scoring import IGNORE_INDEX
from moka_pl.prompts.choice import CHOICE_PROMPTS, ChoicePromptName, resolve_prompt
from moka_pl.prompts.templates import alpaca_prompt


def row(question="Why?", choices=("So.", "Not so."), answer=1, task="arc_easy"):
    return {
        "location": "x, line 1",
        "task": task,
        "question": question,
        "choices": list(choices),
        "answer": answer,
    }


def texts(name, **options):
    prompt, answer = CHOICE_PROMPTS[name].segments(row(**options))
    assert (prompt.trained, answer.trained, answer.end) == (False, True, True)
    return prompt.text, answer.text


def test_cloze():
    assert texts("cloze") == ("Question: Why?\nAnswer:", " Not so.")


def test_letters():
    assert texts("letters") == ("Question: Why?\nA. So.\nB. Not so.\nAnswer:", " B")
    assert CHOICE_PROMPTS["letters"].options(row()) == [" A", " B"]
    with pytest.raises(DataError, match="27 choices, but there are only 26 letters"):
        texts("letters", choices=["x"] * 27)


def test_llm_adapters():
    prompt, answer = texts("llm_adapters")
    assert answer == "the correct answer is answer2"
    assert prompt == alpaca_prompt(
        "Please choose the correct answer to the question: Why?\n\nAnswer1: So. Answer2: Not so.\n\n"
        "Answer format: answer1/answer2"
    )
    assert CHOICE_PROMPTS["llm_adapters"].names(row()) == ["answer1", "answer2"]


@pytest.mark.parametrize(
    ("task", "instruction"),
    [
        (
            "arc_easy",
            "Please choose the correct answer to the question: Why?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
            "Answer format: answer1/answer2/answer3",
        ),
        (
            "boolq",
            "Please answer the following question with true or false, question: is it so?\n\nAnswer format: "
            "true/false",
        ),
        (
            "piqa",
            "Please choose the correct solution to the question: How?\n\nSolution1: a Solution2: b\n\n"
            "Answer format: solution1/solution2",
        ),
        (
            "hellaswag",
            "Please choose the correct ending to complete the given sentence: So\n\nEnding1: a Ending2: b\n\n"
            "Answer format: ending1/ending2",
        ),
        (
            "winogrande",
            "Please choose the correct answer to fill in the blank to complete the given sentence: It _\n\n"
            "Option1: a Option2: b\n\nAnswer format: option1/option2",
        ),
    ],
)
def test_the_form_is_the_corpora_s_own(task, instruction):
    answer = instruction.rsplit("/", 1)[1]
    checked = parse_choice({"instruction": instruction, "answer": answer}, task)
    assert CHOICE_PROMPTS["llm_adapters"].before(checked) == alpaca_prompt(instruction)
    assert CHOICE_PROMPTS["llm_adapters"].options(checked)[checked["answer"]].endswith(f" {answer}")


def encoded(tiny_tokenizer, path, split="validation", trained=None, **options):
    data = CommonsenseData(path, path, **options)
    data.connect(tiny_tokenizer, trained)
    data.setup()
    return data, data._encoded[split].rows[0]


@pytest.fixture
def path(write_jsonl):
    records = [
        {"task": "t", "question": f"Which is {n}?", "choices": [f"{n}", "none"], "answer": 0} for n in "ab"
    ]
    return write_jsonl("questions.jsonl", records)


def test_items_in_every_form(tiny_tokenizer, path):
    decode = tiny_tokenizer.decode
    for name, options, chars in (
        ("cloze", [" a", " none"], [1, 4]),
        ("letters", [" A", " B"], [1, 1]),
        ("llm_adapters", ["the correct answer is answer1", "the correct answer is answer2"], [29, 29]),
    ):
        data, item = encoded(tiny_tokenizer, path, prompt=name)
        assert [decode(ids) for ids in item["option_ids"]] == options
        assert item["option_chars"] == chars
        assert item["option_names"] == (["answer1", "answer2"] if name == "llm_adapters" else [])
        train = data._encoded["train"].rows[0]
        right = item["option_ids"][0]
        assert train["input_ids"] == [*item["prompt_ids"], *right, tiny_tokenizer.eos_token_id]
        assert [t for t in train["labels"] if t != IGNORE_INDEX] == [*right, tiny_tokenizer.eos_token_id]
    _, silent = encoded(tiny_tokenizer, path, prompt="llm_adapters", generated_tokens=0)
    assert silent["option_names"] == []


def test_batches_for_generating(tiny_tokenizer, path):
    data, _ = encoded(tiny_tokenizer, path, prompt="llm_adapters")
    batch = next(iter(data.val_dataloader()))
    questions = batch["questions"]
    assert batch["answer_names"] == ["answer1", "answer1"]
    assert (questions["attention_mask"][:, -1] == 1).all()
    for ids, mask in zip(questions["input_ids"], questions["attention_mask"], strict=True):
        assert tiny_tokenizer.decode(ids[mask == 1]).endswith("### Response:\n")


def test_the_adapters_own_prompt_is_the_default(tiny_tokenizer, path):
    data, item = encoded(tiny_tokenizer, path, trained="letters")
    assert data.prompt == "letters"
    assert tiny_tokenizer.decode(item["option_ids"][0]) == " A"
    assert encoded(tiny_tokenizer, path, trained="alpaca")[0].prompt == "cloze"
    # The next adapter was trained in another form: what is encoded is not used for it.
    data.connect(tiny_tokenizer, "cloze")
    data.setup()
    assert tiny_tokenizer.decode(data._encoded["validation"].rows[0]["option_ids"][0]) == " a"
    chats = InstructionData(prompt=None)
    chats.connect(tiny_tokenizer, "alpaca")
    assert chats.prompt == "alpaca"
    assert InstructionData().prompt == "chat"
    mixture = MixtureData([CommonsenseData(path, path), InstructionData()])
    mixture.connect(tiny_tokenizer, "alpaca")
    mixture.setup("validate")
    assert mixture.prompt == "alpaca"


def test_another_prompt_is_warned_of_once():
    warned: set[str] = set()

    def settled():
        return resolve_prompt("letters", "cloze", CHOICE_PROMPTS, "cloze", warned=warned)

    with pytest.warns(UserWarning, match=r"trained with `prompt: cloze`.*`prompt: letters`") as seen:
        assert [settled(), settled()] == ["letters", "letters"]
    assert len(seen) == 1
    assert resolve_prompt("letters", "letters", CHOICE_PROMPTS, "cloze", warned=set()) == "letters"
    assert resolve_prompt("letters", "alpaca", CHOICE_PROMPTS, "cloze", warned=set()) == "letters"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "letter"}, "prompt must be one of cloze, letters, llm_adapters, got 'letter'"),
        ({"generated_tokens": -1}, "generated_tokens must be at least 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(DataError, match=message):
        CommonsenseData(**options)


def test_every_prompt_has_its_name():
    assert tuple(CHOICE_PROMPTS) == get_args(ChoicePromptName)
