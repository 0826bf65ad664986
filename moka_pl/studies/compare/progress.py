"""How long runs take, how much time is left, and the lines that tell it."""

import json
import time
from collections.abc import Callable
from statistics import fmean

from moka_pl.studies.compare.schedule import Left, Task
from moka_pl.studies.compare.store import Outcome

#: A run may take this much longer than expected.
_SLACK = 1.15


class Times:
    """Estimates how long tasks take, from those that have ended.

    A training is expected to take as long as those of the same adapter, else of the same data and length,
    else as all of them; a test as those of the same data.
    """

    def __init__(self) -> None:
        self._training: dict[str, list[float]] = {}
        self._testing: dict[str, list[float]] = {}

    def add(self, task: Task, outcome: Outcome, begun: Outcome) -> None:
        """Notes how long a task took.

        Args:
            task: The task.
            outcome: What is known of its run now.
            begun: What was known before.
        """
        if "trained" in outcome and "trained" not in begun and task.run.rate is not None:
            for kind in _kinds(task):
                self._training.setdefault(kind, []).append(outcome["trained"]["seconds"])
        if "tested" in outcome and outcome["tested"] != begun.get("tested"):
            for kind in (task.run.test_key, ""):
                self._testing.setdefault(kind, []).append(outcome["tested"]["seconds"])

    def expected(self, task: Task, known: Outcome) -> float:
        """Seconds that a task will take; 0 if nothing like it has ended yet.

        Args:
            task: The task.
            known: What is known of its run already.
        """
        seconds = 0.0
        if "trained" not in known and task.run.rate is not None:
            seconds = next((fmean(self._training[k]) for k in _kinds(task) if k in self._training), 0.0)
        if task.test:
            kinds = (task.run.test_key, "")
            seconds += next((fmean(self._testing[k]) for k in kinds if k in self._testing), 0.0)
        return seconds


class Clock:
    """Knows how much time is left.

    Args:
        minutes: Minutes from now; None for as many as it takes.
        reserve: Seconds of them that are kept for the reports.
    """

    def __init__(self, minutes: float | None = None, reserve: float = 0.0) -> None:
        self.end = None if minutes is None else time.monotonic() + max(1.0, 60 * minutes - reserve)

    def left(self) -> float | None:
        """Seconds that are left, at least 0; None for no limit."""
        return None if self.end is None else max(0.0, self.end - time.monotonic())

    def has(self, seconds: float) -> bool:
        """Whether something that takes so long would probably end in time."""
        left = self.left()
        return left is None or left > _SLACK * seconds


class Progress:
    """Prints a line a task, with the time that all that are left will take.

    Args:
        left: Tells what is left, with what is being done.
        outcome: Tells what is known of a task's run.
        times: Estimates.
        jobs: Tasks at a time.
    """

    def __init__(
        self, left: Callable[[], Left], outcome: Callable[[Task], Outcome], times: Times, jobs: int
    ) -> None:
        self._left, self._outcome, self._times, self._jobs = left, outcome, times, jobs
        self._begin = time.monotonic()
        self.done = 0

    def add(self, task: Task, outcome: Outcome, seconds: float) -> None:
        """Prints what became of a task.

        Args:
            task: The task.
            outcome: What is known of its run now.
            seconds: How long it took.
        """
        self.done += 1
        left = self._left()
        count = len(left.tasks) + len(left.later)
        found = _words(outcome) if "error" not in outcome else f"FAILED: {outcome['error']}"
        line = f"[{self.done}/{self.done + count}] {task.run}: {found} ({duration(seconds)})"
        if count:
            total = sum(self._times.expected(task, self._outcome(task)) for task in left.tasks + left.later)
            line += f"; about {duration(total / min(self._jobs, count))} left"
        print(line, flush=True)

    def close(self) -> None:
        """Prints how long everything took."""
        if self.done:
            took = duration(time.monotonic() - self._begin)
            print(f"{self.done} runs in {took}, {self._jobs} at a time", flush=True)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _kinds(task: Task) -> list[str]:
    """What trainings have in common, the nearest relatives first."""
    settings = task.run.settings
    same = [settings["data"], settings["training"].get("trainer")]
    return [json.dumps([*same, settings["adapter"]], sort_keys=True), json.dumps(same, sort_keys=True), ""]


def _words(outcome: Outcome) -> str:
    trained, tested = outcome["trained"], outcome.get("tested")
    words = []
    if "validation_loss" in trained:
        loss = trained["validation_loss"]
        words.append("diverged" if loss is None else f"validation loss {loss:.4f}")
    if tested and "acc_norm" in tested["mean"]:
        words.append(f"test acc_norm {100 * tested['mean']['acc_norm']:.1f}")
    return ", ".join(words) or "done"
