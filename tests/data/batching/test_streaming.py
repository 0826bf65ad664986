import json
from itertools import chain, islice

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from moka_pl.data import DataError, InstructionData, MixtureData
from moka_pl.data.batching.streaming import StreamedBatches, StreamLoader
from moka_pl.data.encoding.report import DROPPED, KEPT
from moka_pl.lm.scoring import IGNORE_INDEX


def records(first, count):
    return [
        {"instruction": "Say it.", "output": f"n{n} " + "x" * (n % 7)} for n in range(first, first + count)
    ]


@pytest.fixture
def folder(write_jsonl, tmp_path):
    """Three files of 9, 10 and 4 examples."""
    for name, first, count in (("a", 0, 9), ("b", 9, 10), ("c", 19, 4)):
        write_jsonl(f"corpus/{name}.jsonl", records(first, count))
    return tmp_path / "corpus"


def streamed(tokenizer, folder, rank=0, world=1, **options):
    """A loader without a trainer: an iteration is one pass."""
    defaults = {"streaming": True, "prompt": "alpaca", "batch_size": 2, "stream_buffer": 4}
    module = InstructionData(folder, **(defaults | options))
    module._rank_and_world = lambda: (rank, world)
    module.connect(tokenizer)
    module.prepare_data()
    module.setup("fit")
    return module.train_dataloader()


def numbers(batch, tokenizer):
    """The examples of a batch by the number in their answers; a row without an answer gives none."""
    texts = [tokenizer.decode(row[row != IGNORE_INDEX]) for row in batch["labels"]]
    return [int(text.split()[0][1:]) for text in texts if text]


def test_a_pass_holds_every_example_once_and_passes_differ(tiny_tokenizer, folder):
    loader = streamed(tiny_tokenizer, folder)
    first = [numbers(batch, tiny_tokenizer) for batch in loader]
    assert sorted(chain(*first)) == list(range(23))
    assert [len(batch) for batch in first].count(2) >= 10
    second = [numbers(batch, tiny_tokenizer) for batch in loader]
    assert sorted(chain(*second)) == list(range(23))
    assert second != first
    assert [numbers(batch, tiny_tokenizer) for batch in streamed(tiny_tokenizer, folder)] == first
    assert [numbers(batch, tiny_tokenizer) for batch in streamed(tiny_tokenizer, folder, seed=1)] != first


def test_files_are_joined_and_the_buffer_bounds_the_shuffling(tiny_tokenizer, folder):
    loader = streamed(tiny_tokenizer, folder / "b.jsonl", stream_buffer=5, batch_size=5)
    first, second = [numbers(batch, tiny_tokenizer) for batch in loader]
    assert sorted(first) == list(range(9, 14))
    assert sorted(second) == list(range(14, 19))


def test_similar_lengths_stand_together(tiny_tokenizer, folder):
    def spread(**options):
        loader = streamed(tiny_tokenizer, folder, stream_buffer=23, **options)
        return sum(
            max(lengths) - min(lengths)
            for batch in loader
            for lengths in [[int((row != IGNORE_INDEX).sum()) for row in batch["labels"]]]
        )

    assert spread(bucket=True) < spread(bucket=False) / 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_and_workers_share_the_examples(tiny_tokenizer, folder, world, workers):
    ranks = [
        list(streamed(tiny_tokenizer, folder, rank, world, num_workers=workers)) for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [number for batches in ranks for batch in batches for number in numbers(batch, tiny_tokenizer)]
    assert sorted(seen) == list(range(23))


def test_dropped_examples_leave_the_ranks_in_step(tiny_tokenizer, write_jsonl):
    # Only the examples of one rank's share may fit: its batches get smaller, or hold one masked row.
    rows = records(0, 12)
    for row in rows[1::2] + rows[:6]:
        row["instruction"] = "word " * 400
    path = write_jsonl("a.jsonl", records(50, 4) + rows)
    ranks = [list(streamed(tiny_tokenizer, path, rank, 2, max_length=200)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    seen = [number for batches in ranks for batch in batches for number in numbers(batch, tiny_tokenizer)]
    assert sorted(seen) == [6, 8, 10, 50, 51, 52, 53]
    empty = [batch for batches in ranks for batch in batches if not numbers(batch, tiny_tokenizer)]
    assert empty
    assert all(batch["num_tokens"] == 0 for batch in empty)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_after_any_batch(tiny_tokenizer, folder, workers):
    loader = streamed(tiny_tokenizer, folder, num_workers=workers)
    whole, states = [], []
    for _ in range(2):
        for batch in loader:
            whole.append(numbers(batch, tiny_tokenizer))
            states.append(json.loads(json.dumps(loader.state_dict())))
    for done in (1, 3, 7, 12, len(whole) - 2):
        resumed = streamed(tiny_tokenizer, folder, num_workers=workers)
        resumed.load_state_dict(states[done - 1])
        rest = []
        while len(rest) < len(whole) - done:
            rest += [numbers(batch, tiny_tokenizer) for batch in resumed]
        assert rest == whole[done:], done


def test_counts(tiny_tokenizer, folder, write_jsonl, monkeypatch):
    said = []
    monkeypatch.setattr("moka_pl.data.batching.streaming.rank_zero_info", said.append)
    write_jsonl("corpus/d.jsonl", [{"instruction": "word " * 400, "output": "x"}])
    loader = streamed(tiny_tokenizer, folder, max_length=200, num_workers=2)
    batches = iter(loader)
    next(batches)
    assert loader.report.read == 4
    list(batches)
    assert len(said) == 1
    assert said[0].startswith("instruction train, pass 1, first rank: 24 examples read, 23 kept (0 truncated")
    assert "1 dropped" in said[0]


class Model(pl.LightningModule):
    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.layer = torch.nn.Linear(1, 1)
        self.seen, self.validated = [], 0

    def training_step(self, batch, batch_idx):
        self.seen.append(numbers(batch, self.tokenizer))
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        self.validated += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tokenizer, folder, tmp_path, ckpt_path=None, **options):
    model = Model(tokenizer)
    saving = ModelCheckpoint(
        dirpath=tmp_path,
        every_n_train_steps=1,
        save_top_k=-1,
        filename="{step}",
        auto_insert_metric_name=False,
    )
    trainer = pl.Trainer(
        **({"accelerator": "cpu", "max_epochs": 1, "logger": False, "num_sanity_val_steps": 0} | options),
        callbacks=[] if ckpt_path else [saving],
        enable_checkpointing=not ckpt_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = InstructionData(
        folder,
        validation_path=folder / "c.jsonl",
        streaming=True,
        prompt="alpaca",
        batch_size=2,
        stream_buffer=4,
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return model, trainer


@pytest.mark.filterwarnings("ignore")
def test_with_a_trainer(tiny_tokenizer, folder, tmp_path):
    # 23 examples are 12 batches; the run goes through them nearly twice.
    model, trainer = fit(tiny_tokenizer, folder, tmp_path, max_steps=10, accumulate_grad_batches=2)
    assert len(model.seen) == 20
    assert trainer.global_step == 10
    assert model.validated == 2
    assert sorted(chain(*model.seen[:12])) == list(range(23))
    for step in (1, 5, 7):
        resumed, _ = fit(
            tiny_tokenizer,
            folder,
            tmp_path,
            ckpt_path=tmp_path / f"{step}.ckpt",
            max_steps=10,
            accumulate_grad_batches=2,
        )
        assert resumed.seen == model.seen[2 * step :], step


@pytest.mark.filterwarnings("ignore")
def test_steps_are_asked_for(tiny_tokenizer, folder, tmp_path):
    with pytest.raises(DataError, match=r"streaming: true needs trainer\.max_steps.*--trainer\.max_steps"):
        fit(tiny_tokenizer, folder, tmp_path)


def test_errors_name_file_and_line_before_training(tiny_tokenizer, tmp_path, folder, write_jsonl):
    write_jsonl("bad/a.jsonl", [{"instruction": "x"}])
    with pytest.raises(DataError, match=r"bad/a\.jsonl, line 1: field 'output' is missing"):
        streamed(tiny_tokenizer, tmp_path / "bad")
    with pytest.raises(DataError, match="does not exist"):
        streamed(tiny_tokenizer, tmp_path / "none.jsonl")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_in_the_middle_are_one_message(tiny_tokenizer, write_jsonl, workers):
    path = write_jsonl("a.jsonl", [*records(0, 9), {"instruction": "x", "output": 3}])
    with pytest.raises(DataError) as caught:
        list(streamed(tiny_tokenizer, path, num_workers=workers))
    assert str(caught.value).startswith(f"{path}, line 10: field 'output' must be text, found int 3")
    assert "Traceback" not in str(caught.value)


def test_all_too_long(tiny_tokenizer, write_jsonl):
    path = write_jsonl("a.jsonl", [{"instruction": "word " * 100, "output": "x"}] * 9)
    with pytest.raises(
        DataError, match=r"all 4 examples of the first buffer .*max_length=64.*longest example has \d+"
    ):
        list(streamed(tiny_tokenizer, path, max_length=64))


def test_hub_stream(tiny_tokenizer, monkeypatch):
    import datasets

    asked = []

    def load(name, split, streaming):
        asked.append((name, split, streaming))
        return datasets.Dataset.from_list(records(0, 9)).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    loader = streamed(tiny_tokenizer, "tatsu-lab/alpaca")
    assert set(asked) == {("tatsu-lab/alpaca", "train", True)}
    batches, states = [], []
    for batch in loader:
        batches.append(numbers(batch, tiny_tokenizer))
        states.append(loader.state_dict())
    assert sorted(chain(*batches)) == list(range(9))
    resumed = streamed(tiny_tokenizer, "tatsu-lab/alpaca")
    resumed.load_state_dict(states[2])
    assert [numbers(batch, tiny_tokenizer) for batch in resumed] == batches[3:]
    with pytest.raises(DataError, match="a single hub dataset"):
        streamed(tiny_tokenizer, ["alpaca", "dolly"])


def test_hub_errors_count_the_examples(tiny_tokenizer, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([*records(0, 6), {"instruction": "x", "output": None}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: rows.to_iterable_dataset())
    with pytest.raises(DataError, match=r"tatsu-lab/alpaca \(train\), example 7: field 'output'"):
        list(streamed(tiny_tokenizer, "alpaca"))


def test_refusals(tiny_tokenizer, folder, write_jsonl):
    loader = streamed(tiny_tokenizer, folder)
    with pytest.raises(DataError, match="num_workers=2, but this run has 0"):
        loader.load_state_dict({"num_workers": 2})
    with pytest.raises(DataError, match="a mixture cannot stream"):
        MixtureData([InstructionData(folder, streaming=True)])
    with pytest.raises(DataError, match="stream_buffer must be at least batch_size"):
        InstructionData(folder, streaming=True, batch_size=8, stream_buffer=4)
    for options in ({"packing": True}, {"max_tokens": 1024}):
        (name,) = options
        with pytest.raises(DataError, match=f"{name}: .* needs the length of every example, which streaming"):
            InstructionData(folder, streaming=True, **options)
    tree = write_jsonl("t.jsonl", [{"message_id": "a", "parent_id": None, "role": "prompter", "text": "x"}])
    with pytest.raises(DataError, match="message trees cannot be streamed"):
        streamed(tiny_tokenizer, tree)


def test_nothing_is_held_out(tiny_tokenizer, folder):
    module = InstructionData(folder, streaming=True, prompt="alpaca")
    module.connect(tiny_tokenizer)
    module.setup()
    assert module.val_dataloader() == []
    assert module.eval_sets == []


class Counted:
    """Numbered records in files of given sizes; what is above the limit is dropped by the encoder."""

    def __init__(self, sizes):
        self.starts = [sum(sizes[:n]) for n in range(len(sizes))]
        self.sizes = sizes

    def open(self, epoch):
        from datasets import IterableDataset

        shards = list(zip(self.starts, self.sizes, strict=True))
        return IterableDataset.from_generator(numbered, gen_kwargs={"shards": shards})

    def parse(self, item, number):
        return item


def numbered(shards):
    for start, size in shards:
        for number in range(start, start + size):
            yield {"number": number}


class Encoder:
    max_length = 8

    def __init__(self, dropped):
        self.dropped = dropped

    def __call__(self, row):
        number = row["number"]
        lost = number > 0 and number % self.dropped == 0
        length = 2 + number % 5
        return {
            "input_ids": [number] * length,
            "labels": [number] * length,
            "length": length,
            "full_length": length,
            "tokens": length,
            "trained": length,
            "status": DROPPED if lost else KEPT,
        }


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    batch_size=st.integers(1, 4),
    more=st.integers(0, 6),
    world=st.integers(1, 3),
    dropped=st.sampled_from([2, 3, 100]),
    bucket=st.booleans(),
    cut=st.integers(0, 40),
)
def test_every_example_once_whatever_the_sizes(sizes, batch_size, more, world, dropped, bucket, cut):
    def loader(rank):
        batches = StreamedBatches(
            Counted(sizes), Encoder(dropped), batch_size, batch_size + more, rank, world, bucket=bucket
        )
        return StreamLoader(batches)

    ranks = []
    for rank in range(world):
        try:
            whole = [batch["labels"].tolist() for batch in loader(rank)]
        except DataError:  # nothing is left of a first block
            reject()
        ranks.append(whole)
        assert all(len(batch) <= batch_size for batch in whole)
        done = min(cut, len(whole) - 1)
        interrupted, resumed = loader(rank), loader(rank)
        assert len(list(islice(interrupted, done))) == done
        resumed.load_state_dict(interrupted.state_dict())
        assert [batch["labels"].tolist() for batch in resumed] == whole[done:]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [row[0] for batches in ranks for batch in batches for row in batch if row[0] != IGNORE_INDEX]
    assert sorted(seen) == [n for n in range(sum(sizes)) if n == 0 or n % dropped]
