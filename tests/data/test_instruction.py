import pytest

from moka_pl.data import DataError, InstructionData
from moka_pl.data.encoding.examples import SegmentEncoder
from moka_pl.data.splits import HoldOut
from moka_pl.lm.scoring import IGNORE_INDEX


def alpaca_records(count):
    return [{"instruction": f"Say {n}.", "input": "", "output": f"Number {n}."} for n in range(count)]


def ready(module, tokenizer, stage=None):
    module.connect(tokenizer)
    module.prepare_data()
    module.setup(stage)
    return module


def completions(module, split, tokenizer):
    rows = module._encoded[split].rows
    return [tokenizer.decode([t for t in labels if t != IGNORE_INDEX]) for labels in rows["labels"]]


def test_sample(tiny_tokenizer):
    module = ready(InstructionData(batch_size=4), tiny_tokenizer)
    assert module.report["train"].read == 152
    assert module.report["validation"] == module.report["test"]
    assert module.eval_sets == [("instruction", [])]
    batch = next(iter(module.train_dataloader()))
    assert batch["input_ids"].shape[0] == 4
    assert len(module.val_dataloader()) == 12
    assert ready(InstructionData(prompt="alpaca"), tiny_tokenizer).report["train"].read == 115


def test_alpaca_file(tiny_tokenizer, write_jsonl):
    path = write_jsonl("a.jsonl", alpaca_records(20))
    module = ready(InstructionData(path, prompt="alpaca", validation_share=0.2), tiny_tokenizer)
    held = completions(module, "validation", tiny_tokenizer)
    train = completions(module, "train", tiny_tokenizer)
    assert (len(train), len(held)) == (16, 4)
    assert sorted(train + held) == sorted(f"Number {n}.<|im_end|>" for n in range(20))


def test_several_files_of_both_forms(tiny_tokenizer, write_jsonl, tmp_path):
    first = write_jsonl("a.jsonl", alpaca_records(2))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    second = write_jsonl("b.jsonl", [{"messages": turns}])
    module = ready(InstructionData([first, str(second)], validation_path=first), tiny_tokenizer)
    assert completions(module, "train", tiny_tokenizer) == [
        "Number 0.<|im_end|>",
        "Number 1.<|im_end|>",
        "Ho<|im_end|>",
    ]
    assert module.report["validation"].read == 2
    with pytest.raises(DataError, match="list of sources is empty"):
        ready(InstructionData([], validation_path=first), tiny_tokenizer)


def test_bos_for_alpaca_only(bos_tokenizer, write_jsonl):
    path = write_jsonl("a.jsonl", alpaca_records(4))
    for prompt, first in (("alpaca", "<s>"), ("chat", "<|im_start|>")):
        module = ready(InstructionData(path, prompt=prompt), bos_tokenizer)
        assert bos_tokenizer.convert_ids_to_tokens(module._encoded["train"].rows[0]["input_ids"])[0] == first


def test_hold_out_follows_the_content(write_jsonl):
    from datasets import Dataset

    rows = [{"location": str(n), "text": f"row {n % 30}"} for n in range(40)]
    train, held = HoldOut(0.2)(Dataset.from_list(rows))
    assert len(train) + len(held) == 40
    assert not set(train["text"]) & set(held["text"])
    assert 8 <= len(held) <= 9
    again = HoldOut(0.2)(Dataset.from_list(rows[::-1]))[1]
    assert set(again["text"]) == set(held["text"])
    with pytest.raises(DataError, match=r"too few different examples \(1\)"):
        HoldOut(0.2)(Dataset.from_list(rows[:1]))


def test_no_validation(tiny_tokenizer, write_jsonl):
    path = write_jsonl("a.jsonl", alpaca_records(4))
    module = ready(InstructionData(path, validation_share=0), tiny_tokenizer)
    assert module.val_dataloader() == []
    assert module.eval_sets == []
    assert module.report.keys() == {"train"}
    assert module.report["train"].read == 4


def test_second_setup_encodes_nothing(tiny_tokenizer, write_jsonl, monkeypatch):
    path = write_jsonl("a.jsonl", alpaca_records(10))
    first = ready(InstructionData(path), tiny_tokenizer)
    monkeypatch.setattr(SegmentEncoder, "__call__", lambda self, row: pytest.fail("encoded again"))
    second = ready(InstructionData(path, batch_size=3, seed=5), tiny_tokenizer)
    assert second.report == first.report


def test_reported_once(tiny_tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr("moka_pl.data.base.rank_zero_info", said.append)
    module = ready(InstructionData(), tiny_tokenizer, "fit")
    module.setup("fit")
    module.setup("validate")
    assert [line.split(":")[0] for line in said] == ["instruction train", "instruction validation"]


def test_processes(tiny_tokenizer, write_jsonl):
    path = write_jsonl("a.jsonl", alpaca_records(10))
    alone = ready(InstructionData(path), tiny_tokenizer)
    several = InstructionData(path, num_proc=2, max_length=500)
    assert (
        ready(several, tiny_tokenizer)._encoded["train"].rows["labels"]
        == alone._encoded["train"].rows["labels"]
    )


def test_missing_template_shows_before_reading(tiny_tokenizer):
    tiny_tokenizer.chat_template = None
    module = InstructionData("no/such/file.jsonl")
    module.connect(tiny_tokenizer)
    with pytest.raises(DataError, match="no chat template"):
        module.prepare_data()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"validation_share": 1.0}, "validation_share"),
        ({"prompt": "other"}, "'chat' or 'alpaca'"),
    ],
)
def test_wrong_options(options, part):
    with pytest.raises(DataError, match=part):
        InstructionData(**options)


def test_no_tokenizer_and_no_setup(tiny_tokenizer):
    module = InstructionData()
    with pytest.raises(DataError, match=r"connect\(tokenizer\)"):
        module.prepare_data()
    module.connect(tiny_tokenizer)
    with pytest.raises(DataError, match=r"Call `setup\(\)` first"):
        module.train_dataloader()
