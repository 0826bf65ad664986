import errno
import io
import os
import random
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from moka_pl.cli.checkpoint_path import find_last
from moka_pl.errors import CheckpointError, ConfigError
from moka_pl.training.writing import checkpoint_files
from moka_pl.training.writing.checkpoint_files import read_checkpoint, unusable_reason, write_whole
from moka_pl.training.writing.whole_files import WholeFiles, write_whole_files


def content(value=1.0, step=1):
    state = {0: {"exp_avg": torch.ones(50)}}
    return {
        "state_dict": {"a": torch.full((1000,), value)},
        "optimizer_states": [{"state": state, "param_groups": [{"lr": 0.1}]}],
        "global_step": step,
        "callbacks": {"EarlyStopping": {"best_score": torch.tensor(float("inf"))}},  # no sign of a failure
    }


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "last.ckpt"
    write_whole(content(), path)
    return path


# Writing


def test_a_file_is_replaced_whole_and_reads_as_what_was_written(file):
    mask = os.umask(0o022)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask
    io_plugin = WholeFiles()
    io_plugin.save_checkpoint(content(2.0), file)
    found = io_plugin.load_checkpoint(file, weights_only=True)
    assert found["state_dict"]["a"].eq(2).all()
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


def test_checkpoints_of_one_moment_are_one_file(file):
    files, other = WholeFiles(), file.with_name("epoch=0-step=1.ckpt")
    for value in (2.0, 3.0):
        with files.same_moment():
            files.save_checkpoint(content(value), other)
            files.save_checkpoint(content(value), file)
            files.save_checkpoint(content(value), file)
        assert file.samefile(other)
        assert read_checkpoint(file)["state_dict"]["a"].eq(value).all()
    files.save_checkpoint(content(4.0), file)
    assert read_checkpoint(other)["state_dict"]["a"].eq(3).all()
    assert read_checkpoint(file)["state_dict"]["a"].eq(4).all()
    assert len(list(file.parent.iterdir())) == 2


def test_without_hard_links_each_is_written(file, monkeypatch):
    def link(*names):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    files, other = WholeFiles(), file.with_name("other.ckpt")
    with files.same_moment():
        files.save_checkpoint(content(2.0), other)
        files.save_checkpoint(content(2.0), file)
    assert not file.samefile(other)
    assert read_checkpoint(file)["state_dict"]["a"].eq(2).all()
    assert len(list(file.parent.iterdir())) == 2


class Full(io.RawIOBase):
    """A disk that is full after some bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 100, 3000])
@pytest.mark.parametrize("older", [True, False])
def test_a_disk_that_fills_up_leaves_the_older_file(file, monkeypatch, room, older):
    original = checkpoint_files._Sink.__init__
    monkeypatch.setattr(
        checkpoint_files._Sink, "__init__", lambda self, file: original(self, Full(file, room))
    )
    if not older:
        file.unlink()
    with pytest.raises(CheckpointError) as caught:
        write_whole(content(2.0), file)
    text = str(caught.value)
    assert f"cannot write the checkpoint {file}: No space left on device (" in text
    assert " needed, " in text
    assert ("The older file is unchanged" in text) == older
    assert "\n" not in text
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"] * older
    if older:
        assert read_checkpoint(file)["state_dict"]["a"].eq(1).all()


def test_too_little_space_is_seen_before_writing(file, monkeypatch):
    usage = checkpoint_files.shutil.disk_usage(file.parent)
    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(checkpoint_files.torch, "save", lambda *args: pytest.fail("something was written"))
    with pytest.raises(CheckpointError, match=r"No space left on device \(.* needed, 1,000 bytes free\)"):
        write_whole(content(), file)


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*taken/last.ckpt: "):
        write_whole(content(), tmp_path / "taken" / "last.ckpt")


def test_left_overs_of_killed_writers_are_removed_but_not_of_living_ones(file):
    dead, alive = (file.with_name(f".last.ckpt.{name}.part") for name in ("dead", "alive"))
    dead.write_bytes(b"half")
    with alive.open("wb") as writing:
        assert checkpoint_files._lock(writing)
        write_whole(content(), file)
        assert sorted(path.name for path in file.parent.iterdir()) == [alive.name, "last.ckpt"]


def test_trainers_write_whole_files_unless_told_otherwise():
    class Own(TorchCheckpointIO):
        pass

    for given, kind in ((TorchCheckpointIO(), WholeFiles), (Own(), Own)):
        trainer = SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=given))
        write_whole_files(trainer)
        assert type(trainer.strategy.checkpoint_io) is kind


def write_for_ever(path):
    for step in range(10**6):
        write_whole({"state_dict": {"a": torch.full((200_000,), float(step))}}, path)


@pytest.mark.slow
def test_killed_at_any_moment_the_old_or_the_new_file_is_there(file):
    pick = random.Random(0)
    for _ in range(8):
        child = get_context("fork").Process(target=write_for_ever, args=(file,))
        child.start()
        time.sleep(pick.uniform(0.1, 0.3))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert unusable_reason(file) is None
    assert read_checkpoint(file)["state_dict"]["a"].numel() == 200_000
    write_whole(content(), file)
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


# Reading


def damage(data, kind):
    middle = len(data) // 2
    return {
        "empty": b"",
        "half": data[:middle],
        "without its end": data[:-30],
        "zeros within": data[:middle] + bytes(200) + data[middle + 200 :],
        "a flipped bit": data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :],
        "text": b"no checkpoint",
        "a pickle of something": b"\x80\x02]q\x00.",
    }[kind]


KINDS = [
    "empty",
    "half",
    "without its end",
    "zeros within",
    "a flipped bit",
    "text",
    "a pickle of something",
]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_said_in_one_line(file, kind):
    file.write_bytes(damage(file.read_bytes(), kind))
    with pytest.raises(ConfigError) as caught:
        read_checkpoint(file)
    assert f"--ckpt_path {file} is damaged or not a checkpoint (" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_no_damage_escapes(file):
    pick, data = random.Random(1), file.read_bytes()
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(pick.choice([1, 1, 3, 30])):
            changed[pick.randrange(len(data))] = pick.randrange(256)
        if pick.random() < 0.3:
            del changed[pick.randrange(len(changed)) :]
        file.write_bytes(changed)
        reason = unusable_reason(file)  # raises nothing
        assert reason is None or "\n" not in reason


@pytest.mark.parametrize("place", ["state_dict", "optimizer_states"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(file, place, bad):
    checkpoint = content()
    tensors = checkpoint["state_dict"]
    (tensors if place == "state_dict" else checkpoint[place][0]["state"][0])["b"] = torch.tensor([1.0, bad])
    torch.save(checkpoint, file)
    with pytest.raises(
        ConfigError, match=rf"holds values that are not finite \(in {place}.*\.b\).*--ckpt_path last"
    ):
        read_checkpoint(file)


@pytest.mark.parametrize("kind", [*KINDS, "nan", "missing"])
def test_last_passes_by_what_is_unusable(tmp_path, caplog, kind):
    def spoil(path):
        if kind == "nan":
            torch.save(content(float("nan"), step=9), path)
        elif kind == "missing":
            path.unlink()
        else:
            path.write_bytes(damage(path.read_bytes(), kind))

    earlier, run = (tmp_path / "demo" / f"version_{k}" / "checkpoints" for k in (3, 10))
    for folder in (earlier, run):
        for step in (4, 10, 8):
            write_whole(content(step=step), folder / f"epoch=0-step={step}.ckpt")
        write_whole(content(step=12), folder / "last.ckpt")
    options = type("Options", (), {"save_dir": str(tmp_path), "name": "demo", "version": None})
    logger = SimpleNamespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=options)
    assert find_last(logger) == (run / "last.ckpt", 10)
    spoil(run / "last.ckpt")
    with caplog.at_level("INFO"):
        assert find_last(logger) == (run / "epoch=0-step=10.ckpt", 10)
    if kind != "missing":
        assert f"{run}/last.ckpt " in caplog.text
        assert f"going on from {run}/epoch=0-step=10.ckpt\n" in caplog.text
    spoil(run / "epoch=0-step=10.ckpt")
    assert find_last(logger) == (run / "epoch=0-step=8.ckpt", 10)
    assert find_last(logger, str(run))[0] == run / "epoch=0-step=8.ckpt"
    for step in (4, 8):
        spoil(run / f"epoch=0-step={step}.ckpt")
    with caplog.at_level("INFO"):
        assert find_last(logger) == (earlier / "last.ckpt", 3)
    if kind != "missing":
        assert f"going on from {earlier}/last.ckpt of an earlier run" in caplog.text


def test_a_link_to_a_file_that_is_gone_is_passed_by(file):
    write_whole(content(step=3), file.with_name("3.ckpt"))
    file.unlink()
    file.symlink_to("gone.ckpt")
    assert find_last(False, str(file.parent))[0] == Path(file.with_name("3.ckpt"))
