import itertools

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moka_pl.callbacks import Throughput
from moka_pl.callbacks.throughput import peak_memory


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by half a second at every look."""
    ticks = itertools.count()
    monkeypatch.setattr("moka_pl.callbacks.throughput.time.perf_counter", lambda: next(ticks) / 2)


def test_counts_real_tokens_only(make_module, make_data, make_trainer, tmp_path, clock):
    data, speed = make_data(bucket=False), Throughput(window=2)
    logger = TensorBoardLogger(tmp_path, name="run")
    make_trainer(speed, logger=logger).fit(make_module(), data)
    rows = data._encoded["train"].rows
    assert speed.total_tokens == sum(rows["length"][:])
    padded = sum(batch["input_ids"].numel() for batch in data.train_dataloader())
    assert padded > 1.05 * speed.total_tokens
    # Half a second a batch, seven batches.
    assert speed.train_seconds == pytest.approx(3.5)
    assert speed.tokens_per_second == pytest.approx(speed.total_tokens / 3.5)

    found = EventAccumulator(logger.log_dir)
    found.Reload()
    loader = data.train_dataloader()
    tokens = [batch["num_tokens"] for batch in loader]
    logged = [event.value for event in found.Scalars("train/tokens_per_second")]
    expected = [tokens[0] / 0.5, *((a + b) / 1.0 for a, b in itertools.pairwise(tokens))]
    assert logged == pytest.approx(expected)
    memory = [event.value for event in found.Scalars("train/peak_memory_gib")]
    assert 0.1 < memory[0] <= memory[-1] < 32
    assert "tok/s" not in found.Tags()["scalars"]  # for the progress bar only


class Save(Callback):
    """Saves a checkpoint in the middle of an epoch."""

    def __init__(self, file):
        self.file = file

    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.file)


def test_a_run_resumed_within_an_epoch_starts_the_clock(
    make_module, make_data, make_trainer, tmp_path, monkeypatch
):
    make_trainer(Save(tmp_path / "middle.ckpt")).fit(make_module(), make_data(bucket=False))
    ticks = itertools.count(20_000)  # a machine that has been up for hours
    monkeypatch.setattr("moka_pl.callbacks.throughput.time.perf_counter", lambda: next(ticks) / 2)
    speed = Throughput()
    trainer = make_trainer(speed)
    trainer.fit(make_module(), make_data(bucket=False), ckpt_path=tmp_path / "middle.ckpt")
    assert trainer.global_step == 7
    assert speed.train_seconds == pytest.approx(4 * 0.5)


def test_nothing_trained():
    assert Throughput().tokens_per_second == 0.0


def test_peak_memory_grows_with_use():
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(2**28 // 4 * 3)  # 768 MiB, more than is free below the peak so far
    block += 1
    assert peak_memory(torch.device("cpu")) >= before
