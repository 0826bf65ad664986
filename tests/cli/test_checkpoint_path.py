"""``--ckpt_path``: the newest run's, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moka_pl.cli.checkpoint_path import check_path, find_last, say_which_weights
from moka_pl.errors import ConfigError


def logger(folder, kind="TensorBoardLogger"):
    options = SimpleNamespace(save_dir=str(folder), name="demo", version=None)
    return SimpleNamespace(class_path=f"lightning.pytorch.loggers.{kind}", init_args=options)


def run_folder(folder: Path, version: str, finished: bool = True) -> Path:
    checkpoints = folder / "demo" / version / "checkpoints"
    checkpoints.mkdir(parents=True)
    if finished:
        (checkpoints / "last.ckpt").touch()
    return checkpoints / "last.ckpt"


def test_newest_run_with_a_checkpoint(tmp_path):
    run_folder(tmp_path, "version_9")
    newest = run_folder(tmp_path, "version_10")  # newer than 9, though it sorts before it
    run_folder(tmp_path, "version_11", finished=False)
    run_folder(tmp_path, "version_x")
    assert find_last(logger(tmp_path)) == (newest, 10)


def test_home_folders_are_found_and_unknown_ones_are_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    newest = run_folder(tmp_path, "version_1")
    assert find_last(logger("~")) == (newest, 1)
    assert find_last(False, "~/" + str(newest.parent.relative_to(tmp_path)))[0] == newest
    with pytest.raises(ConfigError, match=r"~no_such_user/x \(checkpoint.dirpath\) has no last.ckpt"):
        find_last(False, "~no_such_user/x")


@pytest.mark.parametrize(("kept", "version"), [({"moka_log_version": 3}, 3), ({}, None)])
def test_checkpoints_in_a_folder_of_the_users(tmp_path, kept, version):
    run_folder(tmp_path, "version_9")
    path = tmp_path / "mine" / "last.ckpt"
    with pytest.raises(ConfigError, match=r"mine \(checkpoint.dirpath\) has no last.ckpt"):
        find_last(logger(tmp_path), str(path.parent))
    path.parent.mkdir()
    torch.save({"callbacks": {"Other": [], "RunCheckpoint{}": {"dirpath": "mine"} | kept}}, path)
    assert find_last(logger(tmp_path), str(path.parent)) == (path, version)
    assert find_last(False, str(path.parent)) == (path, None)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ConfigError, match="is damaged or not a checkpoint"):
        find_last(logger(tmp_path), str(path.parent))


def test_no_run_yet(tmp_path):
    with pytest.raises(ConfigError, match=r"no run below .*demo has a checkpoints/last.ckpt"):
        find_last(logger(tmp_path))


@pytest.mark.parametrize(
    "value", [None, True, False, SimpleNamespace(class_path="x.Y", init_args=SimpleNamespace(save_dir="x"))]
)
def test_logger_without_versions(value):
    with pytest.raises(ConfigError, match="give the path of the checkpoint instead"):
        find_last(value)


def test_a_logger_whose_versions_are_no_folders(tmp_path):
    """W&B's are the ids of its runs; those of another logger in the same folder are none of its."""
    run_folder(tmp_path, "version_3")
    for name, found in (("WandbLogger", False), ("CSVLogger", True), ("TensorBoardLogger", True)):
        given = logger(tmp_path, name)
        if found:
            assert find_last(given)[1] == 3
            continue
        with pytest.raises(ConfigError, match=rf"\(the first\) is {given.class_path}; give the path"):
            find_last(given)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "--ckpt_path is empty; give a .ckpt file, or last, or leave it out"),
        ("  ", "--ckpt_path is empty; "),
        ("best", "give --model.adapter_path RUN/adapters/best, a .ckpt file, or last"),
        ("hpc", "no run writes Lightning's hpc_ckpt files; give a .ckpt file, or last"),
        ("registry.ckpt", "--ckpt_path registry.ckpt: no such file; give a .ckpt file, or last"),
        ("nowhere://x.ckpt", "--ckpt_path nowhere://x.ckpt: .*; give a .ckpt file, or last"),
        ("memory://absent.ckpt", "absent.ckpt: nothing is there, or it cannot be reached; give a .ckpt file"),
    ],
)
def test_no_checkpoint(tmp_path, path, message):
    with pytest.raises(ConfigError, match=message):
        check_path(path, logger(tmp_path))


@pytest.mark.parametrize("path", ["registry", "Registry:name:version:2"])
def test_a_registry_needs_its_package(tmp_path, monkeypatch, path):
    monkeypatch.setattr("moka_pl.cli.checkpoint_path.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"{path}: the registry needs the package litmodels"):
        check_path(path, logger(tmp_path))
    monkeypatch.setattr("moka_pl.cli.checkpoint_path.find_spec", lambda name: object())
    check_path(path, logger(tmp_path))


def test_files_here_and_elsewhere_are_checkpoints(tmp_path):
    path = run_folder(tmp_path, "version_0")
    check_path(str(path), logger(tmp_path))
    check_path(path.as_uri(), logger(tmp_path))


def test_the_best_weights_are_the_newest_runs_adapter(tmp_path):
    for version in ("version_9", "version_10", "version_x"):
        (tmp_path / "demo" / version / "adapters" / "best").mkdir(parents=True)
    (tmp_path / "demo" / "version_11").mkdir()
    for kept, adapter in ((None, tmp_path / "demo/version_10/adapters/best"), ("mine", "mine/best")):
        with pytest.raises(ConfigError, match=f"give --model.adapter_path {adapter}, a .ckpt file, or last"):
            check_path("best", logger(tmp_path), kept)


@pytest.mark.parametrize(("path", "adapter"), [("a.ckpt", "run/best"), ("a.ckpt", None), (None, "run/best")])
def test_a_checkpoint_and_an_adapter_have_different_weights(caplog, path, adapter):
    caplog.set_level("INFO")
    say_which_weights(path, adapter)
    both = "run/best gives the options of the adapter only; its weights are those of --ckpt_path a.ckpt."
    assert (both in caplog.text) == (None not in (path, adapter))
