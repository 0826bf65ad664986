"""What a watched training tells."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger

from moka_pl.callbacks import GateMonitor
from moka_pl.studies.long_run import watch
from moka_pl.studies.long_run.watch import RunWatch, busy_share


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=30))
def test_the_busy_share_counts_each_moment_once(spans) -> None:
    spans = [(start, start + length) for start, length in spans]
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    begin = first + (last - first) / 6
    moments = [begin + (last - begin) * (i + 0.5) / 500 for i in range(500)]
    counted = sum(any(start <= moment < end for start, end in spans) for moment in moments) / 500
    assert busy_share(spans) == pytest.approx(counted, abs=0.05)


def test_nothing_recorded_is_no_share() -> None:
    assert busy_share([]) is None


@pytest.fixture
def watched(make_module, make_data, make_trainer, tmp_path, monkeypatch):
    """Trains with the watch, and returns the lines and the steps whose gates were logged."""
    monkeypatch.setattr(watch, "BLOCK", 2)
    logged = []

    class Gates(GateMonitor):
        def on_train_batch_end(self, trainer, *of_batch) -> None:
            logged.append((trainer.global_step, len(trainer.loggers)))

    def run(steps, **options):
        file = tmp_path / "lines.jsonl"
        trainer = make_trainer(
            RunWatch(str(file), **options), Gates(), logger=CSVLogger(tmp_path), max_steps=steps, max_epochs=9
        )
        trainer.fit(make_module(), make_data())
        return [json.loads(line) for line in file.read_text().splitlines()], logged

    return run


def test_a_line_after_each_while_and_one_in_the_end(watched) -> None:
    lines, logged = watched(4, seconds=0.0)
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["ms"] > 0 and line["rss_mib"] > 0 and line["threads"] > 0 for line in lines)
    assert all(loggers == 1 for _, loggers in logged)


def test_logging_is_switched_off_and_on_in_turn(watched, monkeypatch) -> None:
    monkeypatch.setattr(watch, "events_bytes", lambda trainer: 1e6 * len(trainer.loggers))
    (line,), logged = watched(8, turns=2)
    assert line["pairs"] == 1
    assert line["logged_ms"] > 0
    assert line["events_mb"] == 1  # of the loggers, though the run ends while they are off
    # The gates' callback is still called in the step that switches.
    assert [step for step, _ in logged] == [1, 2, 5, 6]
    assert {step for step, loggers in logged if loggers} == {1, 5}
