"""Profiles of steps."""

import warnings

import pytest

from moka_pl.studies.ranks.cases import GROUPS
from moka_pl.studies.ranks.clock import StepClock
from moka_pl.studies.ranks.profile import StepProfile, Waits


def wait() -> None:
    warnings.warn("called a synchronizing CUDA operation", stacklevel=2)


def test_waits_are_counted_by_the_calls_that_led_there(recwarn):
    waits = Waits()
    waits.begin()
    for _ in range(3):
        wait()
    wait()
    warnings.warn("another one", stacklevel=1)
    waits.end()
    wait()
    head, first, second = waits.table(5).splitlines()
    assert "in 5 steps" in head
    assert first.split()[:2] == ["3", f"ranks/test_profile.py:{wait.__code__.co_firstlineno + 1}"]
    assert "test_waits_are_counted" in first
    assert second.split()[0] == "1"
    assert [str(one.message).split()[0] for one in recwarn] == ["another", "called"]


def test_files_come_after_two_looks(tmp_path):
    profile = StepProfile(tmp_path, begin=1, steps=2)
    for step in range(1, 4):
        profile.end_step(step)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["waits.txt"]
    profile.end_step(4)
    profile.end_step(5)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"waits.txt", "host.txt", "gpu.txt", "trace.json.gz"}


@pytest.mark.parametrize("saves_at", [case.saves_at for group in GROUPS.values() for case in group])
def test_both_looks_lie_within_every_training(tmp_path, make_module, make_trainer, saves_at):
    clock = StepClock(str(tmp_path), 1, saves_at, str(tmp_path))
    clock.on_train_start(make_trainer(), make_module())
    profile = clock._profile
    assert profile is not None
    assert profile.begin >= 1
    assert profile.steps > 0
    assert profile.begin + 2 * profile.steps < saves_at  # a checkpoint is none of it
