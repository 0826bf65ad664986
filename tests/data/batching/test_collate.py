import torch
from torch.utils.data import DataLoader

from moka_pl.data.batching.collate import BatchRows, collate_packs
from moka_pl.data.batching.samplers import EvalSampler, filler
from moka_pl.data.encoding.choices import choice_item_features
from moka_pl.data.encoding.examples import token_features
from moka_pl.lm.scoring import IGNORE_INDEX

COUNTS = {"length": 0, "padded_tokens": 0, "full_length": 0, "tokens": 0, "trained": 0, "status": 0}


def plain():
    from datasets import Dataset

    rows = [
        {"input_ids": list(range(1, n + 1)), "labels": [IGNORE_INDEX, *list(range(2, n + 1))], **COUNTS}
        for n in (3, 9, 5)
    ]
    return BatchRows(Dataset.from_list(rows, features=token_features()), pad_id=99)


def choices():
    from datasets import Dataset

    rows = [
        {
            "prompt_ids": [1, 2, 3],
            "option_ids": [[4], [5, 6]],
            "option_chars": [1, 7],
            "option_names": [],
            "shared_tokens": 0,
            "left_out": 0,
            "answer": 1,
            "task": 2,
            **COUNTS,
        },
        {
            "prompt_ids": [7],
            "option_ids": [[8], [9], [10, 11]],
            "option_chars": [3, 4, 5],
            "option_names": [],
            "shared_tokens": 0,
            "left_out": 0,
            "answer": 0,
            "task": 0,
            **COUNTS,
        },
    ]
    return BatchRows(Dataset.from_list(rows, features=choice_item_features()), pad_id=0)


def test_plain_batch():
    batch = plain()[[0, 1]]
    assert set(batch) == {"input_ids", "labels", "num_tokens", "num_examples", "rows"}
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 16)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"][0].tolist() == [1, 2, 3] + [99] * 13
    assert batch["labels"][0].tolist() == [IGNORE_INDEX, 2, 3] + [IGNORE_INDEX] * 13
    assert (batch["num_tokens"], batch["num_examples"]) == (12, 2)
    assert isinstance(batch["num_tokens"], int)
    assert batch["rows"] == [0, 1]


def test_multiple_of_eight():
    assert plain()[[0, 2]]["input_ids"].shape == (2, 8)


def test_plain_filler():
    batch = plain()[[0, filler(2)]]
    assert batch["input_ids"][1, :5].tolist() == [1, 2, 3, 4, 5]
    assert (batch["labels"][1] == IGNORE_INDEX).all()
    assert batch["num_tokens"] == 3
    assert batch["rows"] == [0]
    assert plain()[[filler(0)]]["num_tokens"] == 0


def test_single_index_is_a_batch_of_one():
    assert plain()[1]["input_ids"].shape == (1, 16)
    assert len(plain()) == 3


def test_choice_batch():
    batch = choices()[[1, 0]]
    assert batch["input_ids"].shape == (5, 8)
    assert batch["input_ids"][:, :5].tolist() == [
        [7, 8, 0, 0, 0],
        [7, 9, 0, 0, 0],
        [7, 10, 11, 0, 0],
        [1, 2, 3, 4, 0],
        [1, 2, 3, 5, 6],
    ]
    assert batch["labels"][4, :6].tolist() == [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 5, 6, IGNORE_INDEX]
    assert batch["item"].tolist() == [0, 0, 0, 1, 1]
    assert batch["task"].tolist() == [0, 0, 0, 2, 2]
    assert batch["is_answer"].tolist() == [True, False, False, False, True]
    assert batch["option_chars"].tolist() == [3, 4, 5, 1, 7]
    assert batch["num_tokens"] == 2 + 2 + 3 + 4 + 5
    assert batch["is_answer"].dtype == torch.bool
    assert {batch[key].dtype for key in ("item", "task", "option_chars")} == {torch.int64}


def test_choice_filler():
    batch = choices()[[1, filler(0)]]
    assert batch["task"].tolist() == [0, 0, 0, -1, -1]
    assert batch["item"].tolist() == [0, 0, 0, 1, 1]
    assert not batch["is_answer"][3:].any()
    assert (batch["labels"][3:] == IGNORE_INDEX).all()
    assert batch["num_tokens"] == 7


def test_ranks_count_nothing_twice():
    rows = plain()
    tokens, trained = 0, 0
    for rank in range(2):
        sampler = EvalSampler([3, 9, 5], 1, num_replicas=2, rank=rank)
        batches = list(DataLoader(rows, batch_size=None, sampler=sampler))
        assert len(batches) == 2
        tokens += sum(batch["num_tokens"] for batch in batches)
        trained += sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    assert (tokens, trained) == (17, 14)


def test_packs():
    rows = plain()
    batch = rows[[[0, 1], [2], [-1 - 0]]]  # 3 + 9, 5, and a filler of 3 tokens
    ids, labels, positions = batch["input_ids"], batch["labels"], batch["position_ids"]
    assert ids.shape == labels.shape == positions.shape == (3, 16)
    first, second, third = (rows[[i]]["input_ids"][0].tolist() for i in range(3))
    assert ids[0].tolist() == first[:3] + second[:9] + [99] * 4
    assert ids[1].tolist() == third[:5] + [99] * 11
    assert positions[0].tolist() == [*range(3), *range(9), *range(4)]
    assert positions[1].tolist() == [*range(5), *range(11)]
    assert batch["segment_starts"].tolist() == [0, 3, 12, 16, 21, 32, 35, 48]
    assert batch["segment_starts"].dtype == torch.int32
    assert batch["longest_segment"] == 13
    assert (batch["num_tokens"], batch["num_examples"]) == (17, 3)
    # As unpacked, but for the first token of each example.
    for row, start, index, length in ((0, 0, 0, 3), (0, 3, 1, 9), (1, 0, 2, 5)):
        alone = rows[[index]]["labels"][0].tolist()
        assert labels[row, start : start + length].tolist() == [IGNORE_INDEX, *alone[1:length]]
    assert (labels[0, 12:] == IGNORE_INDEX).all()
    assert (labels[1, 5:] == IGNORE_INDEX).all()
    assert (labels[2] == IGNORE_INDEX).all()
    assert int((labels != IGNORE_INDEX).sum()) > 0


def test_first_token_of_a_packed_example_is_not_predicted():
    rows = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}]
    assert collate_packs([rows], [False], 0)["labels"][0, :4].tolist() == [
        IGNORE_INDEX,
        6,
        IGNORE_INDEX,
        8,
    ]
