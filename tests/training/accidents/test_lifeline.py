import os
import socket

import pytest
from torch.distributed import HashStore

from moka_pl.training.accidents import lifeline
from moka_pl.training.accidents.lifeline import LOST, Ended, Lifeline

SOON = 5.0


@pytest.fixture
def lines():
    """The ends of three processes, of which the first has heard the others."""
    store = HashStore()
    made = [Lifeline(store, rank, "127.0.0.1") for rank in range(3)]
    assert all(line.connect() for line in made)
    for _ in range(4):  # two connections, and what each of the two says first
        assert made[0].look(0.2) is None
    yield made
    for line in made:
        line.close()


def test_nobody_connects_before_the_first_process_listens():
    store = HashStore()
    second = Lifeline(store, 1, "127.0.0.1")
    assert not second.connect()
    first = Lifeline(store, 0, "127.0.0.1")
    assert second.connect()
    for line in (first, second):
        line.close()


def test_nothing_is_heard_of_processes_that_work(lines):
    assert [line.look(0.01) for line in lines] == [None] * 3


def test_all_learn_of_one_that_is_gone_without_a_word(lines):
    lines[1].close()
    assert lines[0].look(SOON) == lines[2].look(SOON) == Ended(1, LOST)


def test_all_learn_of_the_first_one(lines):
    lines[0].close()
    assert lines[1].look(SOON) == lines[2].look(SOON) == Ended(0, LOST)


@pytest.mark.parametrize("rank", [0, 2])
def test_all_learn_the_status_of_one_that_has_told_why(lines, rank):
    lines[rank].say(Ended(rank, 2))
    lines[rank].close()
    assert {lines[other].look(SOON) for other in {0, 1, 2} - {rank}} == {Ended(rank, 2)}


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_has_done_its_work_is_not_missed(lines, rank):
    lines[rank].say(Ended(rank, 0))
    lines[rank].close()
    assert [lines[other].look(0.2) for other in {0, 1, 2} - {rank}] == [None, None]


def test_what_comes_in_pieces_is_one_word(lines):
    (connection,) = (other.connection for other in lines[1]._others)
    connection.sendall(b"1")
    assert lines[0].look(SOON) is None
    connection.sendall(b" 3\n")
    assert lines[0].look(SOON) == Ended(1, 3)


def test_strangers_have_nothing_to_say(lines):
    port = lines[0]._server.getsockname()[1]
    for word in (b"guessed 1\n1 2\n", b"x" * 300, b"\n", b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(word)
            assert lines[0].look(SOON) is None
        for _ in range(2):
            assert lines[0].look(0.1) is None
    lines[1].say(Ended(1, 2))
    assert lines[0].look(SOON) == Ended(1, 2)


def test_a_loader_s_worker_does_not_outlive_its_parent_for_the_others(lines):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)  # until the parent lets it go
        os._exit(0)
    try:
        lines[1].close()
        assert lines[0].look(SOON) == Ended(1, LOST)
        assert lines[2].look(SOON) == Ended(1, LOST)
    finally:
        os.close(writing)
        os.waitpid(child, 0)


def test_one_machine_s_processes_listen_to_themselves_only():
    with lifeline._listen("127.0.0.1") as alone, lifeline._listen("node0") as among_others:
        assert alone.getsockname()[0] == "127.0.0.1"
        assert among_others.getsockname()[0] in ("::", "0.0.0.0")
