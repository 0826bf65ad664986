import os
import subprocess
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from moka_pl.cli.failures import ranks
from moka_pl.cli.main import main
from moka_pl.errors import ConfigError


@pytest.fixture
def store(monkeypatch):
    """A store that this process is said to share with two others."""
    made = distributed.HashStore()
    made.set_timeout(timedelta(seconds=1))
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(ranks, "rendezvous_store", lambda: made)
    return made


GLOO = "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer. This is typically caused by a crash"


def caused_by(error):
    """An error of the package's that names another one."""
    named = ConfigError("the model cannot be run")
    named.__cause__ = error
    return named


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(GLOO), True),
        (torch.distributed.DistBackendError("NCCL: remote process exited or there was an error"), True),
        (torch.distributed.DistNetworkError("The client socket has failed to connect"), True),
        (torch.distributed.DistBackendError("NCCL: Duplicate GPU detected"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError(GLOO), False),
        (caused_by(RuntimeError(GLOO)), True),
        (caused_by(RuntimeError("another error")), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_that_only_say_that_another_process_is_gone(store, error, lost):
    assert ranks.is_lost_rank(error) == lost


def test_an_error_that_is_its_own_cause():
    error = ConfigError("as it was caught")
    error.__cause__ = error
    assert not ranks.is_lost_rank(error)


def test_the_first_to_fail_tells_and_leaves_its_status(store):
    assert ranks.status_of_others(1) == 1
    assert ranks.tells(2)
    assert not ranks.tells(1)
    assert not ranks.tells(1, lost=True)
    assert ranks.status_of_others(1) == 2


def test_without_the_first_process_one_of_the_others_tells(store, monkeypatch):
    def gone(*args):
        raise distributed.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(ranks, "rendezvous_store", lambda: SimpleNamespace(add=gone, check=gone))
    told = []
    for rank in (1, 2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        told.append(ranks.tells(1, lost=True))
        assert ranks.tells(1)  # its own error
    assert told == [True, False]
    assert ranks.status_of_others(1) == 1


def test_one_process_always_tells():
    assert ranks.tells(2)
    assert ranks.tells(2)


@pytest.mark.parametrize("at_once", [True, False])
def test_started_processes_are_ended(monkeypatch, at_once):
    process = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(ranks, "_launcher", SimpleNamespace(procs=[process]))
    monkeypatch.setattr(ranks, "_PATIENCE", 0.01)
    ranks.end_others(at_once)
    assert process.wait(10) == -9


@pytest.mark.parametrize(
    ("error", "told", "status"),
    [
        (ConfigError("a is b; set it to c"), "moka_pl: error: a is b; set it to c", 2),
        (RuntimeError(GLOO), "moka_pl: error: another process of this run has ended without a word", 1),
    ],
    ids=["own", "lost"],
)
def test_a_command_s_error_is_told_once(store, monkeypatch, capsys, error, told, status):
    def fail(*args):
        raise error

    monkeypatch.setattr("moka_pl.cli.lightning.run", fail)
    statuses = []
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            main(["fit"])
        statuses.append(end.value.code)
    output = capsys.readouterr().err
    assert output.startswith(told)
    assert output.count("moka_pl") == 1
    assert "This is typically" not in output
    assert statuses == [status, status]


def test_processes_that_wait_for_the_first_one_to_disconnect_end_by_themselves(store, monkeypatch):
    waiting = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    monkeypatch.setattr(ranks, "_launcher", SimpleNamespace(procs=[waiting]))
    monkeypatch.setattr(ranks, "_PATIENCE", 2.0)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: waiting.stdin.close())
    ranks.end_together()
    assert waiting.wait() == 0


def test_a_process_that_has_started_no_others_keeps_its_connections(store, monkeypatch):
    monkeypatch.setattr(ranks, "_launcher", None)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: pytest.fail("disconnected"))
    monkeypatch.setenv("MOKA_PL_LAUNCHER", "1")
    ranks.end_together()
    assert "MOKA_PL_LAUNCHER" not in os.environ  # this process may train again, under other ones


def test_a_rank_of_torchrun_does_not_take_an_earlier_run_for_its_parent(monkeypatch):
    monkeypatch.setattr(ranks, "_launcher", None)
    monkeypatch.setattr(os, "kill", lambda *process: pytest.fail("it ended itself"))
    monkeypatch.setenv("MOKA_PL_LAUNCHER", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    ranks.join(SimpleNamespace(strategy=SimpleNamespace(launcher=None), local_rank=1))
