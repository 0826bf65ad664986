import pytest
import torch

from moka_pl.inference import generate_texts, named_option


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the correct answer is answer3", "answer3"),
        ("The correct answer is Solution 2.", "solution2"),
        ("ending4 or ending1", "ending4"),
        ("true", "true"),
        ("It is False: option1", "false"),
        ("answer12", "answer12"),
        ("untrue", ""),
        ("the answer", ""),
        ("", ""),
    ],
)
def test_the_first_named_option_counts(text, found):
    assert named_option(text) == found


class Letters:
    """Decodes every token to its number."""

    pad_token_id = 0

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row.tolist())) for row in rows]


def test_padding_on_the_left_changes_no_answer(tiny_llama):
    prompts = [[5, 9, 2, 8, 30, 11], [3, 1], [17, 4, 6]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    tiny_llama.generation_config.eos_token_id = None
    together = generate_texts(tiny_llama, Letters(), ids, mask, 6)
    alone = [
        generate_texts(tiny_llama, Letters(), torch.tensor([p]), torch.ones(1, len(p), dtype=torch.long), 6)
        for p in prompts
    ]
    assert together == [texts[0] for texts in alone]
    assert len(set(together)) == 3


@pytest.fixture
def answers(monkeypatch):
    """What the model is made to answer, by call; the prompts are kept."""
    seen = []

    def generate(model, tokenizer, input_ids, attention_mask, max_new_tokens):
        prompts = [tokenizer.decode(i[m == 1]) for i, m in zip(input_ids, attention_mask, strict=True)]
        seen.extend((prompt, max_new_tokens) for prompt in prompts)
        return ["the correct answer is answer1, not answer2"] * len(prompts)

    monkeypatch.setattr("moka_pl.evaluation.module.generate_texts", generate)
    return seen


def test_generated_answers_are_matched(make_module, make_commonsense, make_trainer, answers):
    data = make_commonsense(prompt="llm_adapters", generated_tokens=7, max_length=512, eval_batch_size=4)
    values = make_trainer().validate(make_module(), data, verbose=False)[0]
    # Of 9 questions the answers alternate between the first option and the second.
    assert (values["val/generated/even"], values["val/generated/odd"]) == pytest.approx((2 / 3, 3 / 6))
    assert values["val/generated"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert values["val/generated/odd_stderr"] > 0
    assert 0 <= values["val/accuracy"] <= 1
    assert len(answers) == 9
    assert all(prompt.endswith("### Response:\n") and limit == 7 for prompt, limit in answers)


def test_nothing_is_generated_while_training(make_module, make_commonsense, make_trainer, answers):
    data = make_commonsense(prompt="llm_adapters", max_length=512, batch_size=4)
    make_trainer(num_sanity_val_steps=-1, limit_train_batches=1).fit(make_module(), data)
    assert answers == []
    make_trainer().validate(make_module(), make_commonsense(prompt="letters"), verbose=False)
    make_trainer().validate(
        make_module(),
        make_commonsense(prompt="llm_adapters", generated_tokens=0, max_length=512),
        verbose=False,
    )
    assert answers == []
