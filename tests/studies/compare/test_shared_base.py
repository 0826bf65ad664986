import torch
from shared.text import build_tokenizer

from moka_pl.lm.scoring import IGNORE_INDEX
from moka_pl.studies.compare.shared_base import answer_columns, asked, counts_by_task


def test_prompts_end_where_answers_begin():
    tokenizer = build_tokenizer()
    known = [tokenizer(text, add_special_tokens=False).input_ids for text in ("a b", "c", "the answer")]
    rows = [(known[0], known[2]), (known[1], known[1])]
    width = max(len(prompt) + len(answer) for prompt, answer in rows) + 2
    ids = torch.full((3, width), 7)
    labels = torch.full((3, width), IGNORE_INDEX)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    prompts, mask, answers = asked({"input_ids": ids, "labels": labels}, tokenizer)
    for i, (prompt, answer) in enumerate(rows):
        assert prompts[i, mask[i] == 1].tolist() == prompt
        assert mask[i].tolist() == sorted(mask[i].tolist())  # padded on the left
        assert answers[i] == tokenizer.decode(answer)
    assert answers[2] == ""  # a filler


def test_answers_are_counted_by_task():
    plain = [torch.tensor([[2.0, 1.0], [0.0, 0.0]]), torch.tensor([[3.0, 2.0], [1.0, 2.0]])]
    answered = [torch.tensor([[0, 1], [0, 1]]), torch.tensor([[1, 0], [1, 1]])]
    items = {
        "nll": [2.0, 3.0, 1.0],
        "tokens": [1, 2, 2],
        **answer_columns(plain, answered, ["sums", "words"]),
    }
    assert items["task"] == ["sums", "words", "words"]
    assert items["correct"] == items["correct_norm"] == [1, 0, 1]
    counts = counts_by_task(items)
    assert counts["words"].shares()["acc_norm"].value == 0.5
    assert (counts["words"].nll, counts["words"].tokens) == (4.0, 4)
