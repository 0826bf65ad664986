"""A run of two processes that the first one saves when one of them fails.

Run as a script, this file is what each process does.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from shared.environment import own_environment

from moka_pl.adapters import MokaConfig
from moka_pl.backbone import BackboneConfig
from moka_pl.callbacks import GracefulInterrupt
from moka_pl.data import InstructionData
from moka_pl.training.accidents import first_rank
from moka_pl.training.accidents.first_rank import FirstRank
from moka_pl.training.module import MokaModule
from moka_pl.training.sharding.strategy import ShardedStrategy

STEPS = 3


class Fails(Callback):
    """On the second rank memory ends in the step after the last good one."""

    def on_train_start(self, trainer, pl_module):
        pl_module.causal_lm.model.layers[1].mlp.register_forward_hook(lambda *_: self.look(trainer))

    def look(self, trainer):
        if torch.is_grad_enabled() and trainer.global_step == STEPS and trainer.global_rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")


def train(folder):
    torch.manual_seed(3)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ShardedStrategy(process_group_backend="gloo"),
        max_epochs=2,
        limit_val_batches=0,
        logger=False,
        default_root_dir=folder,
        callbacks=[
            Fails(),
            GracefulInterrupt(),
            ModelCheckpoint(folder / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = MokaModule(BackboneConfig(name="tiny", weights="random"), MokaConfig(components=3))
    trainer.fit(module, InstructionData(folder / "train.jsonl", prompt="alpaca", batch_size=2, bucket=False))


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.slow
def test_the_last_step_is_saved_as_at_its_end(tmp_path):
    rows = [{"instruction": f"{n}?", "output": f"answer {n} " * (1 + n % 3)} for n in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = own_environment(tmp_path / "cache")
    command = [sys.executable, __file__, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode != 0
    assert f"Ended after step {STEPS}; checkpoint saved in" in run.stderr + run.stdout
    last, whole = (
        torch.load(tmp_path / "checkpoints" / name, weights_only=True)
        for name in ("last.ckpt", f"step={STEPS}.ckpt")
    )
    assert last["global_step"] == STEPS
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "moka_rng"):
        assert same(last[part], whole[part]), part


class Store(dict):
    """A store within a process."""

    def check(self, keys):
        return all(key in self for key in keys)

    def set(self, key, value):
        self[key] = value

    get = dict.__getitem__


class Rank:
    def __init__(self, first):
        self.is_global_zero = first


@pytest.fixture
def ranks(monkeypatch):
    """Makes the first rank and another one, in one process, given what saves."""
    store, made = Store(), []
    monkeypatch.setattr(first_rank, "rendezvous_store", lambda: store)
    monkeypatch.setattr(first_rank, "_EVERY", 0.001)

    def make(save, last=True):
        made.append(FirstRank(Rank(True), save, lambda: last))
        monkeypatch.setattr(first_rank, "_fits", first_rank._fits - 1)  # as many as in the other process
        return made[0], FirstRank(Rank(False), save, lambda: last)

    yield make
    made[0].end()


def test_a_rank_waits_until_the_first_one_has_saved(ranks):
    asked = []

    def save(step):
        asked.append(step)
        return len(asked) == 3  # its own step has not ended before

    ranks(save)[1].fails(7)
    assert asked == [7, 7, 7]


def test_a_first_rank_that_cannot_save_says_so_once_and_before_it_ends(ranks, monkeypatch):
    begun, go_on, said = threading.Event(), threading.Event(), []

    def say(text):
        begun.set()
        assert go_on.wait(60)
        said.append(text)

    monkeypatch.setattr(first_rank, "_PATIENCE", 0.05)
    monkeypatch.setattr(first_rank, "rank_zero_info", say)
    first, second = ranks(lambda step: False)
    second.fails(7)
    assert begun.wait(60)  # by the thread, while the main thread comes to its own end
    threading.Timer(0.05, go_on.set).start()
    first.save_now()
    assert len(said) == 1
    assert "--ckpt_path last goes on from the last one" in said[0]


def fail(step):
    raise RuntimeError("CUDA error: unspecified launch failure")


@pytest.mark.parametrize("save", [lambda step: False, fail])
@pytest.mark.parametrize("ends", [lambda rank: rank.fails(7), FirstRank.save_now, FirstRank.give_up])
def test_a_first_rank_that_fails_or_is_alone_says_what_there_is_to_go_on_from(ranks, monkeypatch, ends, save):
    said = []
    monkeypatch.setattr(first_rank, "rank_zero_info", said.append)
    first, _ = ranks(save)
    ends(first)
    ends(first)
    assert [text.count("goes on from the last one") for text in said] == [1]


def test_nobody_is_sent_to_a_checkpoint_that_is_not_there(ranks, monkeypatch):
    said = []
    monkeypatch.setattr(first_rank, "rank_zero_info", said.append)
    ranks(lambda step: False, last=False)[0].fails(1)
    assert "of which there is no checkpoint, nor of an earlier one" in said[0]
    assert "--ckpt_path" not in said[0]


def test_a_first_rank_that_fails_saves_first(ranks, monkeypatch):
    said = []
    monkeypatch.setattr(first_rank, "rank_zero_info", said.append)
    asked = []
    ranks(lambda step: not asked.append(step))[0].fails(7)
    assert asked == [7]
    assert not said


class Event:
    """Of a GPU that waits for another rank, for some looks or for ever."""

    def __init__(self, looks):
        self.looks = looks

    def query(self):
        self.looks -= 1
        return self.looks < 0


def test_no_checkpoint_is_copied_of_a_gpu_that_does_not_come_to_its_end(monkeypatch):
    monkeypatch.setattr(first_rank, "_LAST_STEP", 0.2)
    monkeypatch.setattr(first_rank, "dump_checkpoint", lambda trainer: {"epoch": 3})

    class Plain:
        class strategy:  # noqa: N801
            root_device = torch.device("cpu")

    assert first_rank.copied_checkpoint(Plain, None) == {"epoch": 3}
    assert first_rank.copied_checkpoint(Plain, Event(3)) == {"epoch": 3}
    assert first_rank.copied_checkpoint(Plain, Event(10**9)) is None


if __name__ == "__main__":
    train(Path(sys.argv[1]))
