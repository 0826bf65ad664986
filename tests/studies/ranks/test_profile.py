"""Profiles of steps."""

import warnings

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
    assert first.split()[:2] == ["3", "ranks/test_profile.py:9"]
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
