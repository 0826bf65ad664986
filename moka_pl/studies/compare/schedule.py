"""What is left to do of several suites, what of it comes next, and how long it will take."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from moka_pl.studies.compare.runs import (
    Outcome,
    Run,
    Store,
    all_rates,
    frozen_run,
    pick,
    run_of,
    sweep,
    sweeps,
    tested_with,
    trials,
)
from moka_pl.studies.compare.suite import Method, Settings, Suite


@dataclass(frozen=True)
class Task:
    """A run that is to be trained, or trained and tested."""

    run: Run
    test: bool


@dataclass(frozen=True)
class Remaining:
    """What is still to be done.

    Attributes:
        tasks: Tasks that are known.
        later: Runs that will train and test the learning rates which are still to be picked, with any rate.
    """

    tasks: list[Task]
    later: list[Task]


class Plan:
    """The order of the work.

    A method's learning rates are tried first, and more beyond where the suite says so; as soon as all of them
    are known, the picked one is trained with the other seeds and tested. Suites and their methods come in
    their order, so that what is left out when time runs out is the last. A run that two suites have in common
    is done once.

    Args:
        suites: What is compared.
        store: Where outcomes are.
    """

    def __init__(self, suites: Sequence[Suite], store: Store) -> None:
        self._store = store
        self._outcomes: dict[str, Outcome] = {}
        self._failed: set[str] = set()
        self._tested: set[tuple[str, str, str | None]] = set()
        self._busy: dict[str, Task] = {}
        self._queues: list[FrozenTasks | MethodTasks] = []
        for suite in suites:
            queues: list[FrozenTasks | MethodTasks] = [FrozenTasks(suite)] if suite.frozen else []
            self._queues += [*queues, *(MethodTasks(suite, method) for method in suite.methods)]

    def next(self, fits: Callable[[Task], bool] = lambda task: True) -> Task | None:
        """The next task that can be begun.

        Args:
            fits: Whether a task may be begun now.

        Returns:
            A task, which then counts as begun; None if nothing can be begun before another task has ended.
        """
        for task in self._open():
            if task.run.key not in self._busy and fits(task):
                self._busy[task.run.key] = task
                return task
        return None

    def end(self, task: Task, outcome: Outcome) -> None:
        """Notes what became of a task; one that failed is not tried again by this plan."""
        del self._busy[task.run.key]
        self._outcomes[task.run.key] = outcome
        if "error" in outcome:
            self._failed.add(task.run.key)
        if task.test:
            self._tested.add(_test_of(task.run))

    def remaining(self) -> Remaining:
        """Everything that is not done yet, with what is being done; every run once."""
        tasks: dict[str, Task] = {}
        later: dict[tuple[str, ...], list[Task]] = {}
        for queue in self._queues:
            for task in queue.tasks(self):
                old = tasks.get(task.run.key)
                tasks[task.run.key] = task if old is None or task.test else old
            expected = queue.later(self)
            # Suites with the same method, rates and seeds will pick the same.
            later[tuple(task.run.key for task in expected)] = expected
        return Remaining(list(tasks.values()), [task for expected in later.values() for task in expected])

    def outcome(self, run: Run) -> Outcome:
        """What is known of a run."""
        if run.key not in self._outcomes:
            self._outcomes[run.key] = self._store.read(run)
        return self._outcomes[run.key]

    def known(self) -> list[tuple[Task, Outcome]]:
        """The runs that were done before, as far as they have been asked for, with their outcomes."""
        runs = {run.key: run for queue in self._queues for run in queue.runs(self)}
        outcomes = [(run, self.outcome(run)) for run in runs.values()]
        return [(Task(run, "tested" in known), known) for run, known in outcomes if "trained" in known]

    def is_open(self, task: Task) -> bool:
        """Whether something of a task is left; not if it has failed here.

        Of suites that test the same run differently the last test is kept: none is repeated here.
        """
        outcome = self.outcome(task.run)
        tested = _test_of(task.run) in self._tested or tested_with(outcome, task.run)
        done = "trained" in outcome and (not task.test or tested)
        return not done and task.run.key not in self._failed

    def _open(self) -> Iterator[Task]:
        for queue in self._queues:
            yield from queue.tasks(self)


def _test_of(run: Run) -> tuple[str, str, str | None]:
    return run.key, run.test_key, run.text_key


class FrozenTasks:
    """The test of a suite's base without training."""

    def __init__(self, suite: Suite) -> None:
        self._task = Task(frozen_run(suite), True)

    def tasks(self, plan: Plan) -> list[Task]:
        """What is left and can be named."""
        return [self._task] if plan.is_open(self._task) else []

    def later(self, plan: Plan) -> list[Task]:
        """What cannot be named yet."""
        return []

    def runs(self, plan: Plan) -> list[Run]:
        """All runs that it may have."""
        return [self._task.run]


class MethodTasks:
    """The runs of a method in a suite: its learning rates, then every seed of the picked one."""

    def __init__(self, suite: Suite, method: Method) -> None:
        self._suite, self._method = suite, method
        self._tried: dict[tuple[float, ...], list[Task]] = {}
        self._expected = self._tests(method.learning_rates[0])
        self._picked: list[Task] | None = None

    def tasks(self, plan: Plan) -> list[Task]:
        """What is left and can be named."""
        if self._picked is None:
            if trying := self._trying(plan):
                return trying
            method = all_rates(self._suite, self._method, plan.outcome)
            rate = pick(method, trials(self._suite, method, plan.outcome))
            self._picked = [] if rate is None else self._tests(rate)
        return [task for task in self._picked if plan.is_open(task)]

    def later(self, plan: Plan) -> list[Task]:
        """What cannot be named yet, with a rate that may be another one in the end."""
        return self._expected if self._picked is None and self._trying(plan) else []

    def runs(self, plan: Plan) -> list[Run]:
        """All runs that it may have."""
        rates = all_rates(self._suite, self._method, plan.outcome).learning_rates
        return [run_of(self._suite, self._method, rate, seed) for rate in rates for seed in self._suite.seeds]

    def _trying(self, plan: Plan) -> list[Task]:
        """Trainings that are left to pick a rate; a sweep is widened once all of it has ended."""
        for method in sweeps(self._suite, self._method, plan.outcome):
            rates = method.learning_rates
            if rates not in self._tried:
                self._tried[rates] = [Task(run, False) for run in sweep(self._suite, method)]
            if trying := [task for task in self._tried[rates] if plan.is_open(task)]:
                return trying
        return []

    def _tests(self, rate: float) -> list[Task]:
        return [Task(run_of(self._suite, self._method, rate, seed), True) for seed in self._suite.seeds]


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
        remaining: Tells what is left, with what is being done.
        outcome: Tells what is known of a task's run.
        times: Estimates.
        jobs: Tasks at a time.
    """

    def __init__(
        self, remaining: Callable[[], Remaining], outcome: Callable[[Task], Outcome], times: Times, jobs: int
    ) -> None:
        self._remaining, self._outcome, self._times, self._jobs = remaining, outcome, times, jobs
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
        remaining = self._remaining()
        tasks = remaining.tasks + remaining.later
        told = _words(outcome, task.run.beside) if "error" not in outcome else f"FAILED: {outcome['error']}"
        line = f"[{self.done}/{self.done + len(tasks)}] {task.run}: {told} ({duration(seconds)})"
        if tasks:
            total = sum(self._times.expected(task, self._outcome(task)) for task in tasks)
            line += f"; about {duration(total / min(self._jobs, len(tasks)))} left"
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


def _words(outcome: Outcome, beside: Settings) -> str:
    trained, tested = outcome["trained"], outcome.get("tested")
    words = []
    if "validation_loss" in trained:
        loss = trained["validation_loss"]
        words.append("diverged" if loss is None else f"validation loss {loss:.4f}")
    if tested and "acc_norm" in tested["mean"]:
        score = "right answers" if "generate" in beside else "acc_norm"
        words.append(f"test {score} {100 * tested['mean']['acc_norm']:.1f}")
    return ", ".join(words) or "done"
