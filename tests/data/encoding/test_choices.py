import pytest

from moka_pl.data.encoding.choices import ChoiceEncoder
from moka_pl.data.encoding.examples import encode_rows
from moka_pl.data.encoding.report import DROPPED, KEPT, TRUNCATED
from moka_pl.data.formats.choice import choice_features


def prompt_of(row):
    return f"Question: {row['question']}\nAnswer:"


def options_of(row):
    return [f" {choice}" for choice in row["choices"]]


def choice_encoder(tokenizer, max_length=64, bos=False):
    return ChoiceEncoder(tokenizer, prompt_of, options_of, max_length, bos, ("a", "b"))


def question(
    question="What is the capital of France?", choices=("Paris", "London, or so"), answer=0, task="b"
):
    return {"location": "x", "task": task, "question": question, "choices": list(choices), "answer": answer}


def test_choice_items(tiny_tokenizer):
    columns = choice_encoder(tiny_tokenizer)(question())
    decode = tiny_tokenizer.decode
    assert decode(columns["prompt_ids"]) == "Question: What is the capital of France?\nAnswer:"
    assert [decode(ids) for ids in columns["option_ids"]] == [" Paris", " London, or so"]
    assert columns["option_chars"] == [5, 13]
    assert (columns["answer"], columns["task"], columns["status"]) == (0, 1, KEPT)
    longest = max(map(len, columns["option_ids"]))
    assert columns["length"] == len(columns["prompt_ids"]) + longest
    assert columns["padded_tokens"] == 2 * columns["length"]
    assert columns["trained"] == sum(map(len, columns["option_ids"]))


@pytest.mark.parametrize("bos", [False, True])
def test_choice_prompt_is_cut_on_the_left(bos, bos_tokenizer):
    full = choice_encoder(bos_tokenizer, 64, bos)(question())
    cut = choice_encoder(bos_tokenizer, full["length"] - 3, bos)(question())
    assert cut["status"] == TRUNCATED
    assert cut["option_ids"] == full["option_ids"]
    kept = full["prompt_ids"][3:]
    assert cut["prompt_ids"] == ([bos_tokenizer.bos_token_id, *full["prompt_ids"][4:]] if bos else kept)
    assert cut["length"] == full["length"] - 3


def test_choice_with_an_option_that_does_not_fit(tiny_tokenizer):
    longest = max(map(len, choice_encoder(tiny_tokenizer)(question())["option_ids"]))
    fits = choice_encoder(tiny_tokenizer, longest + 1)(question())
    assert (fits["status"], len(fits["prompt_ids"])) == (TRUNCATED, 1)
    # An option needs one token before it to be predicted from.
    assert choice_encoder(tiny_tokenizer, longest)(question())["status"] == DROPPED

    from datasets import Dataset

    rows = Dataset.from_list([question(), question(choices=("yes", "no"))], features=choice_features())
    encoded = encode_rows(rows, choice_encoder(tiny_tokenizer, longest), key="k", label="l")
    assert (encoded.report.dropped, encoded.report.kept, len(encoded.rows)) == (1, 1, 1)
