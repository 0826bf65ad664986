from collections import Counter

import lightning.pytorch as pl
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from moka_pl.data import CommonsenseData, DataError, InstructionData, MixtureData, MokaDataModule
from moka_pl.data.batching.samplers import EvalSampler, TrainSampler
from moka_pl.data.mixture import epoch_counts, repeated
from moka_pl.lm.scoring import IGNORE_INDEX

YAML = """
data:
  class_path: moka_pl.data.MixtureData
  init_args:
    batch_size: 3
    parts:
      - class_path: moka_pl.data.InstructionData
        init_args: {prompt: alpaca, max_length: 256}
      - class_path: moka_pl.data.CommonsenseData
        init_args: {validation_limit: 2}
"""


class Model(pl.LightningModule):
    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        assert isinstance(self.trainer.train_dataloader.sampler, TrainSampler)
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.append((dataloader_idx, "item" in batch))

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, **options):
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def parse(text):
    parser = ArgumentParser()
    parser.add_subclass_arguments(MokaDataModule, "data")
    return parser.instantiate_classes(parser.parse_string(text)).data


def test_from_yaml(tiny_tokenizer):
    mixture = parse(YAML)
    assert isinstance(mixture, MixtureData)
    assert [part.max_length for part in mixture.parts] == [256, 512]
    mixture.connect(tiny_tokenizer)
    mixture.prepare_data()
    mixture.setup()
    assert mixture.report["train"].read == 115 + 224
    assert [name for name, _ in mixture.eval_sets] == ["instruction", "commonsense"]
    assert len(mixture.eval_sets[1][1]) == 8
    loaders = mixture.val_dataloader()
    assert ["item" in next(iter(loader)) for loader in loaders] == [False, True]
    assert next(iter(loaders[0]))["input_ids"].shape[0] == 3
    assert mixture.parts[1].report["validation"].read == 16
    rows = sum(batch["input_ids"].shape[0] for batch in mixture.train_dataloader())
    assert rows == mixture.report["train"].kept


def test_path_options_from_yaml():
    module = parse("data: {class_path: moka_pl.data.InstructionData, init_args: {path: [a.jsonl, b.jsonl]}}")
    assert list(map(str, module.path)) == ["a.jsonl", "b.jsonl"]
    assert parse("data: {class_path: moka_pl.data.InstructionData}").path == "sample"


def test_equal_names_are_numbered_and_mixtures_nest():
    inner = MixtureData([InstructionData(), InstructionData(prompt="alpaca")])
    mixture = MixtureData([inner, CommonsenseData(tasks=["boolean"])])
    assert mixture.eval_sets == [("instruction", []), ("instruction_2", []), ("commonsense", ["boolean"])]
    more = MixtureData([inner, InstructionData(), mixture])
    assert [name for name, _ in more.eval_sets] == [
        "instruction",
        "instruction_2",
        "instruction_3",
        "instruction_4",
        "instruction_2_2",
        "commonsense",
    ]


@pytest.mark.parametrize(
    ("parts", "prompt"),
    [
        ([CommonsenseData(tasks=["boolean"])], "cloze"),
        ([InstructionData(prompt="alpaca"), CommonsenseData(tasks=["boolean"])], "alpaca"),
        ([InstructionData(), MixtureData([InstructionData()])], "chat"),
        ([InstructionData(), InstructionData(prompt="alpaca")], None),
    ],
)
def test_prompt_is_the_one_that_all_instructions_have(parts, prompt):
    assert MixtureData(parts).prompt == prompt


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_sets_are_those_of_the_dataloaders(tiny_tokenizer, write_jsonl, stage):
    path = write_jsonl("a.jsonl", [{"instruction": "Say it.", "output": "It."}])
    mixture = MixtureData([InstructionData(path, validation_share=0), CommonsenseData(tasks=["boolean"])])
    mixture.connect(tiny_tokenizer)
    mixture.setup(stage)
    loaders = mixture.val_dataloader() if stage in ("fit", "validate") else mixture.test_dataloader()
    assert ["item" in next(iter(loader)) for loader in loaders] == [True]
    assert mixture.eval_sets == [("commonsense", ["boolean"])]


def test_parts_without_validation_are_left_out(tiny_tokenizer, write_jsonl):
    path = write_jsonl("a.jsonl", [{"instruction": "Say it.", "output": "It."}])
    mixture = MixtureData([InstructionData(path, validation_share=0), InstructionData()])
    mixture.connect(tiny_tokenizer)
    mixture.setup()
    assert mixture.eval_sets == [("instruction", [])]
    evaluated = [(name, report.kept) for name, split, report in mixture.reports if split == "validation"]
    assert evaluated == [("instruction", mixture.parts[1].report["validation"].kept)]
    trained = [name for name, split, _ in mixture.reports if split == "train"]
    assert trained == ["instruction", "instruction_2"]
    assert len(mixture.val_dataloader()) == 1
    assert mixture.report["train"].read == 153


def test_no_parts():
    with pytest.raises(DataError, match="at least one part"):
        MixtureData([])


@pytest.mark.filterwarnings("ignore")
def test_with_a_trainer(tiny_tokenizer, tmp_path):
    model = Model(tiny_tokenizer)
    nested = MixtureData([InstructionData(max_length=256)], batch_size=2)
    mixture = MixtureData([nested, CommonsenseData(validation_limit=2)], batch_size=8)
    run = trainer(tmp_path, limit_train_batches=3)
    run.fit(model, datamodule=mixture)
    assert set(model.seen) == {(0, False), (1, True)}
    assert mixture.train_dataloader().epoch_batches == 3
    for action in (run.validate, run.test, run.predict):
        model.seen.clear()
        action(model, datamodule=mixture)
        assert set(model.seen) == {(0, False), (1, True)}
    assert all(isinstance(loader.sampler, EvalSampler) for loader in run.predict_dataloaders)


@pytest.mark.filterwarnings("ignore")
def test_trainer_without_validation_data(tiny_tokenizer, tmp_path, write_jsonl):
    path = write_jsonl("a.jsonl", [{"instruction": "Say it.", "output": "It."}])
    model = Model(tiny_tokenizer)
    trainer(tmp_path).fit(model, datamodule=InstructionData(path, validation_share=0))
    assert model.seen == []


@pytest.mark.filterwarnings("ignore")
def test_trainer_that_overfits(tiny_tokenizer, tmp_path):
    class Overfit(Model):
        def training_step(self, batch, batch_idx):
            assert batch["input_ids"].shape[0] == 1
            return self.layer(torch.ones(1)).sum()

    trainer(tmp_path, overfit_batches=2).fit(Overfit(tiny_tokenizer), datamodule=CommonsenseData())


def weighted(tokenizer, write_jsonl, weights, sizes=(40, 10), rank=0, world=1, **options):
    parts = []
    for letter, size in zip("abc", sizes, strict=False):
        rows = [{"instruction": "Say it.", "output": f"{letter}{n}"} for n in range(size)]
        path = write_jsonl(f"{letter}.jsonl", rows)
        parts.append(InstructionData(path, validation_share=0, prompt="alpaca"))
    mixture = MixtureData(parts, weights, batch_size=4, **options)
    mixture._rank_and_world = lambda: (rank, world)
    mixture.connect(tokenizer)
    mixture.prepare_data()
    mixture.setup("fit")
    return mixture.train_dataloader()


def answers(batches, tokenizer):
    texts = [tokenizer.decode(row[row != IGNORE_INDEX]) for batch in batches for row in batch["labels"]]
    return [text.removesuffix("<|im_end|>") for text in texts if text]


def test_weights_repeat_what_is_small(tiny_tokenizer, write_jsonl):
    loader = weighted(tiny_tokenizer, write_jsonl, [2, 3])
    epoch = answers(loader, tiny_tokenizer)
    counts = Counter(text[0] for text in epoch)
    assert counts == {"a": 40, "b": 60}
    times = Counter(epoch)
    assert {times[f"a{n}"] for n in range(40)} == {1}
    assert {times[f"b{n}"] for n in range(10)} == {6}
    loader.sampler.set_epoch(1)
    second = answers(loader, tiny_tokenizer)
    assert second != epoch
    assert sorted(second) == sorted(epoch)


def test_weights_between_whole_numbers(tiny_tokenizer, write_jsonl):
    # 40 : 25, so five of ten are used three times and five twice; the seed says which.
    epochs = [
        answers(weighted(tiny_tokenizer, write_jsonl, [8, 5], seed=s), tiny_tokenizer) for s in (0, 0, 1)
    ]
    often = [sorted(t for t, count in Counter(epoch).items() if count == 3) for epoch in epochs]
    assert len(often[0]) == 5
    assert epochs[0] == epochs[1]
    assert often[0] != often[2]
    assert all(sum(text[0] == "b" for text in epoch) == 25 for epoch in epochs)


def test_weighted_ranks_and_resuming(tiny_tokenizer, write_jsonl):
    alone = weighted(tiny_tokenizer, write_jsonl, [1, 1])
    ranks = [weighted(tiny_tokenizer, write_jsonl, [1, 1], rank=r, world=2, bucket=False) for r in (0, 1)]
    shares = [answers(loader, tiny_tokenizer) for loader in ranks]
    assert len(shares[0]) == len(shares[1]) == 40
    assert sorted(shares[0] + shares[1]) == sorted(answers(alone, tiny_tokenizer))
    batches = list(ranks[0])
    resumed = weighted(tiny_tokenizer, write_jsonl, [1, 1], rank=0, world=2, bucket=False)
    resumed.load_state_dict({"served": 6})
    assert answers(resumed, tiny_tokenizer) == answers(batches[6:], tiny_tokenizer)


@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
)
def test_counts_keep_the_ratio_and_leave_nothing_out(sizes, weights):
    counts = epoch_counts(sizes, weights[: len(sizes)])
    assert all(count >= size for count, size in zip(counts, sizes, strict=True))
    assert any(count == size for count, size in zip(counts, sizes, strict=True))
    unit = max(size / weight for size, weight in zip(sizes, weights, strict=False))
    assert all(abs(count - weight * unit) <= 0.5 for count, weight in zip(counts, weights, strict=False))
    for size, count in zip(sizes, counts, strict=True):
        times = numpy.bincount(repeated(size, count, (0, 1)), minlength=size)
        assert times.sum() == count
        assert times.max() - times.min() <= 1


@pytest.mark.parametrize(
    ("weights", "part"),
    [
        ([1.0], "weights has 1 values for 2 parts"),
        ([1.0, 0.0], r"must be above 0, got \[1.0, 0.0\]"),
        ([1.0, float("nan")], "must be above 0"),
    ],
)
def test_wrong_weights(weights, part):
    with pytest.raises(DataError, match=part):
        MixtureData([InstructionData(), InstructionData()], weights)


def test_weights_from_yaml():
    mixture = parse(YAML.replace("batch_size: 3", "weights: [3, 1]"))
    assert mixture.weights == [3, 1]
