"""Checkpoints that a thread writes while training goes on."""

import errno
import os
import signal
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from moka_pl.callbacks import RunCheckpoint
from moka_pl.errors import CheckpointError
from moka_pl.training.writing import checkpoint_files, whole_files
from moka_pl.training.writing.checkpoint_files import read_checkpoint, unusable_reason
from moka_pl.training.writing.whole_files import WholeFiles, finish_writing

pytestmark = pytest.mark.filterwarnings("ignore:.*only 4 optimizer steps", "ignore:.*not empty")


def content(value=1.0):
    return {"state_dict": {"a": torch.full((1000,), value)}, "global_step": int(value)}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint(content(), path)
    return path


class Held:
    """Writes once it may; whether the thread that asks for it is the main one."""

    def __init__(self, monkeypatch):
        self.go, self.main, self.write = threading.Event(), [], checkpoint_files.write_whole
        monkeypatch.setattr(checkpoint_files, "write_whole", self)

    def __call__(self, *arguments):
        self.main.append(threading.current_thread() is threading.main_thread())
        assert self.main[-1] or self.go.wait(60)
        self.write(*arguments)


@pytest.fixture
def held(monkeypatch):
    held = Held(monkeypatch)
    yield held
    held.go.set()


def stored(path):
    return float(read_checkpoint(path)["state_dict"]["a"][0])


def test_training_goes_on_and_the_file_holds_its_moment(file, held):
    files, checkpoint, older = WholeFiles(), content(2.0), file.with_name("1.ckpt")
    os.link(file, older)
    with files.same_moment(background=True):
        files.save_checkpoint(checkpoint, file.with_name("2.ckpt"))
        files.remove_checkpoint(older)
        files.save_checkpoint(checkpoint, file)
    checkpoint["state_dict"]["a"].fill_(9)
    checkpoint["state_dict"]["b"] = torch.ones(1)
    assert stored(file) == stored(older) == 1
    held.go.set()
    files.finish()
    assert held.main == [False]
    assert file.samefile(file.with_name("2.ckpt"))
    assert stored(file) == 2
    assert "b" not in read_checkpoint(file)["state_dict"]
    assert sorted(path.name for path in file.parent.iterdir()) == ["2.ckpt", "last.ckpt"]
    files.teardown()


def test_without_hard_links_each_is_written_from_the_copy(file, monkeypatch):
    def link(*names):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    files, checkpoint = WholeFiles(), content(2.0)
    with files.same_moment(background=True):
        files.save_checkpoint(checkpoint, file.with_name("2.ckpt"))
        files.save_checkpoint(checkpoint, file)
    checkpoint["state_dict"]["a"].fill_(9)
    files.teardown()
    assert stored(file) == stored(file.with_name("2.ckpt")) == 2


@pytest.mark.parametrize("then", ["save", "save later", "load", "remove", "finish", "teardown"])
def test_whatever_comes_next_waits_for_it(file, held, then):
    files, second = WholeFiles(), file.with_name("second.ckpt")
    with files.same_moment(background=True):
        files.save_checkpoint(content(2.0), file)
    threading.Timer(0.05, held.go.set).start()
    if then == "save later":
        with files.same_moment(background=True):
            files.save_checkpoint(content(3.0), second)
    elif then == "save":
        files.save_checkpoint(content(3.0), second)
    elif then == "load":
        assert files.load_checkpoint(file)["global_step"] == 2
    elif then == "remove":
        files.remove_checkpoint(second)
    else:
        getattr(files, then)()
    assert stored(file) == 2
    files.teardown()


def test_another_thread_writes_at_once_after_it(file, held):
    """As the first rank's does, when the main thread is stuck in its moment."""
    files = WholeFiles()

    def save():
        files.save_checkpoint(content(3.0), file)
        found.append(stored(file))

    found, other = [], threading.Thread(target=save)
    with files.same_moment(background=True):
        files.save_checkpoint(content(2.0), file)
        other.start()
        held.go.set()
        other.join()
    assert found == [3]
    files.teardown()


def fill_disk(monkeypatch):
    def write(checkpoint, path):
        raise CheckpointError(f"cannot write the checkpoint {path}: No space left on device")

    monkeypatch.setattr(checkpoint_files, "write_whole", write)


def test_a_full_disk_is_told_by_whatever_comes_next_and_older_files_stay(file, monkeypatch):
    files, older = WholeFiles(), file.with_name("1.ckpt")
    os.link(file, older)
    with monkeypatch.context() as patched:
        fill_disk(patched)
        with files.same_moment(background=True):
            files.save_checkpoint(content(2.0), file.with_name("2.ckpt"))
            files.remove_checkpoint(older)
            files.save_checkpoint(content(2.0), file)
        with pytest.raises(CheckpointError, match="No space left"):
            files.finish()
    assert stored(file) == stored(older) == 1
    assert not file.with_name("2.ckpt").exists()
    with monkeypatch.context() as patched:
        fill_disk(patched)
        with files.same_moment(background=True):
            files.save_checkpoint(content(2.0), file)
        with pytest.raises(CheckpointError):
            files._jobs._jobs[0].result()
    with pytest.raises(CheckpointError, match="No space left"):  # told, though there is room again
        files.save_checkpoint(content(3.0), file)
    assert stored(file) == 3
    files.teardown()


def test_too_little_space_is_told_before_anything_is_copied(file, free_space, monkeypatch):
    monkeypatch.setattr(whole_files, "host_copy", lambda values: pytest.fail("it was copied"))
    free_space(1000)
    files = WholeFiles()
    with (
        files.same_moment(background=True),
        pytest.raises(CheckpointError, match=r"No space left on device .* needed, 1,000 bytes free"),
    ):
        files.save_checkpoint(content(2.0), file)


def test_what_cannot_be_copied_is_written_at_once(file, held, monkeypatch):
    def refuse(values):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(whole_files, "host_copy", refuse)
    files = WholeFiles()
    with files.same_moment(background=True):
        files.save_checkpoint(content(2.0), file.with_name("2.ckpt"))
        files.save_checkpoint(content(2.0), file)
        assert stored(file) == 2
    assert file.samefile(file.with_name("2.ckpt"))


def write_for_ever(path):
    files = WholeFiles()
    for step in range(10**6):
        with files.same_moment(background=True):
            files.save_checkpoint({"state_dict": {"a": torch.full((200_000,), float(step))}}, path)


@pytest.mark.slow
def test_killed_while_the_thread_writes_the_old_or_the_new_file_is_there(file):
    for after in (0.1, 0.13, 0.17, 0.2, 0.25, 0.3):
        child = get_context("fork").Process(target=write_for_ever, args=(file,))
        child.start()
        child.join(after)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert unusable_reason(file) is None
    assert read_checkpoint(file)["state_dict"]["a"].numel() == 200_000


# In a run


def saving(folder, **options):
    return RunCheckpoint(folder, save_last=True, enable_version_counter=False, **options)


class Weights(Callback):
    """Keeps the adapter's weights after each step."""

    def __init__(self):
        self.after = {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        tensors = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        self.after[trainer.global_step] = {name: p.detach().clone() for name, p in tensors.items()}


def test_a_run_does_not_wait_and_its_files_hold_their_steps(train, tmp_path, held):
    class Go(Callback):
        """Lets the thread write, steps later."""

        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2 and not held.go.is_set():
                assert not list(tmp_path.glob("*.ckpt"))
                held.go.set()

    weights = Weights()
    train(weights, Go(), saving(tmp_path, every_n_train_steps=1, save_top_k=-1), max_epochs=1)
    assert held.main[0] is False
    for step in (1, 2, 3, 4):
        found = torch.load(tmp_path / f"epoch=0-step={step}.ckpt", weights_only=True)
        assert found["global_step"] == step
        assert found["state_dict"].keys() == weights.after[step].keys()
        for name, tensor in weights.after[step].items():
            assert torch.equal(found["state_dict"][name], tensor)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


class Fails(Callback):
    """Fails in a batch."""

    def __init__(self, error):
        self.error = error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("on purpose")], ids=["Ctrl-C", "error"])
def test_a_run_that_ends_early_waits_until_all_is_written(train, tmp_path, monkeypatch, error):
    done = []
    write = checkpoint_files.write_whole

    def slow(checkpoint, path: Path):
        write(checkpoint, path)
        done.append(path.name)

    monkeypatch.setattr(checkpoint_files, "write_whole", slow)
    with pytest.raises((SystemExit, KeyboardInterrupt, ValueError)):
        train(Fails(error), saving(tmp_path, every_n_train_steps=2), max_epochs=1)
    assert done == ["epoch=0-step=2.ckpt"]
    assert unusable_reason(tmp_path / "last.ckpt") is None
    assert not any("checkpoints" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("every", [1, 4])
def test_a_run_whose_disk_is_full_ends_at_the_next_step_with_that_error(train, tmp_path, monkeypatch, every):
    def write(checkpoint, path):
        steps.append(checkpoint["global_step"])
        raise CheckpointError("cannot write the checkpoint: No space left on device")

    class Step(Callback):
        def on_train_batch_start(self, trainer, *args):
            begun.append(trainer.global_step)
            for job in trainer.strategy.checkpoint_io._jobs._jobs:
                job.exception()  # the thread may be late

    steps, begun = [], []
    monkeypatch.setattr(checkpoint_files, "write_whole", write)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(Step(), saving(tmp_path, every_n_train_steps=every), max_epochs=1)
    assert steps[0] == every
    assert begun[-1] <= every
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("reader", ["a logger", "a link"])
def test_files_are_there_at_once_for_those_who_look(train, tmp_path, held, reader):
    class Reads(CSVLogger):
        def after_save_checkpoint(self, checkpoint_callback):
            assert Path(checkpoint_callback.best_model_path).is_file()

    logger = Reads(tmp_path / "logs") if reader == "a logger" else False
    callback = saving(tmp_path, every_n_train_steps=2)
    if reader == "a link":
        callback = RunCheckpoint(tmp_path, save_last="link", every_n_train_steps=2)
    train(callback, logger=logger, max_epochs=1)
    assert held.main
    assert all(held.main)


def test_a_name_that_is_taken_is_seen_once_it_is_written(train, tmp_path, held):
    class Asks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2 and not found:
                held.go.set()
                found.append(callback.file_exists(tmp_path / "last.ckpt", trainer))

    found, callback = [], saving(tmp_path, every_n_train_steps=2)
    train(Asks(), callback, max_epochs=1)
    assert found == [True]


def test_waiting_needs_no_files_of_ours(make_trainer):
    finish_writing(make_trainer())
