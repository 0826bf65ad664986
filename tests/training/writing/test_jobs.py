import threading

import pytest

from moka_pl.training.writing.jobs import Jobs


def test_a_thread_does_them_in_order_while_others_go_on():
    jobs, go, done = Jobs(), threading.Event(), []
    jobs.add(go.wait, 60)
    for number in range(3):
        jobs.add(lambda number: done.append((number, threading.current_thread())), number)
    jobs.check()
    assert done == []
    go.set()
    jobs.finish()
    assert [number for number, _ in done] == [0, 1, 2]
    assert len({thread for _, thread in done}) == 1
    assert threading.current_thread() not in {thread for _, thread in done}
    jobs.end()
    assert not any(thread.is_alive() for _, thread in done)


@pytest.mark.parametrize("ask", ["check", "finish", "end"])
def test_after_a_failure_nothing_is_done_until_it_is_told(ask):
    def fail():
        raise OSError("full")

    jobs, done = Jobs(), []
    jobs.add(fail)
    jobs.add(done.append, 1)
    if ask == "check":
        while not jobs._failed:
            pass
    with pytest.raises(OSError, match="full"):
        getattr(jobs, ask)()
    assert done == []
    jobs.add(done.append, 2)
    jobs.finish()  # it is told once
    assert done == [2]
    jobs.end()
