import subprocess
import threading
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from moka_pl.cli.failures import ranks, watch
from moka_pl.cli.main import main
from moka_pl.training.accidents import first_rank
from moka_pl.training.accidents.lifeline import LOST, Ended, Lifeline

SOON = 10.0
GLOO = "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer"


@pytest.fixture
def processes(monkeypatch):
    """A trainer of the first of two processes, which meet in a store; what they do at their end is kept."""
    store = HashStore()
    shared = SimpleNamespace(clone=lambda: store)
    done = SimpleNamespace(store=store, statuses=[], left=threading.Event(), alarms=[])

    def leave(status):
        done.statuses.append(status)
        done.left.set()

    for name in ("_GRACE", "_EVERY", "_HEARING"):
        monkeypatch.setattr(watch, name, 0.05)
    monkeypatch.setattr(ranks, "run_store", lambda: shared)
    monkeypatch.setattr(ranks, "_launcher", None)
    monkeypatch.setattr(watch, "_runs", 0)
    monkeypatch.setattr(watch.os, "_exit", leave)
    monkeypatch.setattr(watch.signal, "alarm", done.alarms.append)
    environment = SimpleNamespace(main_address="127.0.0.1")
    strategy = SimpleNamespace(cluster_environment=environment)
    done.trainer = SimpleNamespace(world_size=2, global_rank=0, strategy=strategy)
    yield done
    watch.end(0)


@pytest.fixture
def other(processes):
    """The second process's end, once both have found each other."""
    watch.begin(processes.trainer)
    line = Lifeline(processes.store, 1, "127.0.0.1")
    while not line.connect():
        pass
    yield line
    line.close()


def test_a_process_that_waits_in_vain_saves_the_run_and_ends(processes, other, monkeypatch, capsys):
    saved = []
    monkeypatch.setattr(first_rank, "save_now", lambda: saved.append(True))
    other.close()
    assert processes.left.wait(SOON)
    assert processes.statuses == [1]
    assert saved == [True]
    told = (
        "moka_pl: error: another process of this run has ended without a word, perhaps out of memory (rank 1)"
    )
    assert capsys.readouterr().err.count(told) == 1


def test_who_has_told_why_is_not_told_of(processes, other, capsys):
    other.say(Ended(1, 3))
    assert processes.left.wait(SOON)
    assert processes.statuses == [3]
    assert "error" not in capsys.readouterr().err


def test_saving_that_never_ends_does_not_keep_the_process(processes, other, monkeypatch):
    over, given_up = threading.Event(), []
    monkeypatch.setattr(watch, "_SAVING", 0.01)
    monkeypatch.setattr(first_rank, "save_now", over.wait)
    monkeypatch.setattr(first_rank, "give_up_saving", lambda: given_up.append(True))
    other.close()
    assert processes.left.wait(SOON)
    assert given_up == [True]
    over.set()


def test_a_process_that_is_done_ends_nobody(processes, other):
    watch.end(0)
    assert other.look(SOON) is None
    assert not processes.statuses
    assert not processes.alarms


def test_a_run_after_another_is_not_taken_for_it(processes, other):
    early = Lifeline(processes.store, 1, "127.0.0.1", run=2)
    assert not early.connect()
    watch.begin(processes.trainer)
    while not early.connect():
        pass
    assert other.look(SOON) is None  # the first run is done
    early.close()
    assert processes.left.wait(SOON)


def test_a_process_that_fails_tells_the_others_and_is_sure_to_end(processes, other, monkeypatch):
    monkeypatch.setattr(watch.signal, "signal", lambda *handler: None)
    monkeypatch.setattr(watch, "_GRACE", 8.0)
    watch.end(2)
    assert other.look(SOON) == Ended(0, 2)
    assert processes.alarms == [8]


@pytest.mark.parametrize(("ends", "status", "told"), [("kill -9 $$", 1, True), ("exit 2", 2, False)])
def test_a_child_that_ends_before_it_has_connected_is_missed(
    ends, status, told, processes, monkeypatch, capsys
):
    child = subprocess.Popen(["sh", "-c", ends])
    monkeypatch.setattr(ranks, "_launcher", SimpleNamespace(procs=[child]))
    monkeypatch.setattr(ranks, "run_store", lambda: None)
    watch.begin(processes.trainer)
    assert processes.left.wait(SOON)
    assert processes.statuses == [status]
    assert ("error" in capsys.readouterr().err) == told  # one that exits has told why


@pytest.mark.parametrize("status", [LOST, 2])
def test_a_lost_connection_is_told_of_unless_the_other_process_has(
    processes, other, monkeypatch, capsys, status
):
    def fail(*args):
        raise RuntimeError(GLOO)

    monkeypatch.setattr("moka_pl.cli.lightning.run", fail)
    monkeypatch.setattr(ranks, "is_lost_rank", lambda error: True)
    monkeypatch.setattr(watch, "_GRACE", SOON)
    monkeypatch.setattr(watch, "_HEARING", SOON)
    if status == LOST:
        other.close()
    else:
        other.say(Ended(1, status))
    monkeypatch.setattr(ranks, "tells", lambda *args: True)
    monkeypatch.setattr(ranks, "status_of_others", lambda default: default)
    with pytest.raises(SystemExit) as end:
        main(["fit"])
    assert end.value.code == (1 if status == LOST else 2)
    assert capsys.readouterr().err.count("without a word, perhaps out of memory (rank 1)") == (status == LOST)


def test_one_process_is_not_watched():
    before = threading.active_count()
    watch.begin(SimpleNamespace(world_size=1))
    assert watch.heard() is None
    assert threading.active_count() == before
