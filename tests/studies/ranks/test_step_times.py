"""Times of steps by part, and what is made of them."""

import pytest
import torch

from moka_pl.studies import common
from moka_pl.studies.ranks.clock import saving_seconds
from moka_pl.studies.ranks.step_times import PARTS, StepTimes, step_seconds


class Event:
    """An event of a GPU that computes three times as long as the host takes to ask for it."""

    now = 0

    def record(self, stream) -> None:
        Event.now += 1
        self.at = Event.now

    def synchronize(self) -> None:
        assert self.at

    def elapsed_time(self, other) -> float:
        return 3e3 * (other.at - self.at)


@pytest.fixture
def ticking(monkeypatch):
    """Has every look at the host's clock take a second."""
    seconds = iter(range(1000))
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(seconds))


def taken(times: StepTimes, steps: int) -> dict:
    times.mark()
    for step in range(1, steps + 1):
        for _ in PARTS[:-1]:
            times.mark()
        times.end_step(logs=step % 2 == 0)
    times.mark()  # of a step that has only begun
    return times.collect()


def test_parts_are_times_between_marks(ticking):
    found = taken(StepTimes(torch.device("cpu")), 3)
    assert found["gpu_ms"] is None
    assert found["host_ms"] == {part: [1e3] * 3 for part in PARTS}
    assert found["after_log"] == [False, False, True]
    assert step_seconds(found) == [4.0] * 3


def test_a_step_takes_as_long_as_the_gpu(ticking, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    found = taken(StepTimes(torch.device("cuda")), 2)
    assert found["host_ms"]["update"] == [1e3] * 2
    assert found["gpu_ms"]["update"] == [3e3] * 2
    assert step_seconds(found) == [12.0] * 2


def test_saving_is_compared_with_steps_that_log_alike():
    between = [9e3, 10.0, 30.0, 10.0, 530.0, 10.0, 40.0]
    after_log = [False, False, True, False, True, False, True]
    steps = {"gpu_ms": None, "host_ms": {"between": between}, "after_log": after_log}
    assert saving_seconds(steps, 4) == pytest.approx(0.495)
    assert saving_seconds(steps, 7) is None
