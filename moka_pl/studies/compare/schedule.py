"""What is left to do of several suites, and what of it comes next."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moka_pl.studies.compare.picks import pick, sweep, trials
from moka_pl.studies.compare.runs import Run, frozen_run, run_of
from moka_pl.studies.compare.store import Outcome, Store, tested_with
from moka_pl.studies.compare.suite import Rival, Suite


@dataclass(frozen=True)
class Task:
    """A run that is to be trained, or trained and tested."""

    run: Run
    test: bool


@dataclass(frozen=True)
class Left:
    """What is left.

    Attributes:
        tasks: Tasks that are known.
        later: Runs that will train and test the learning rates which are still to be picked, with any rate.
    """

    tasks: list[Task]
    later: list[Task]


class Plan:
    """The order of the work.

    A rival's learning rates are tried first; as soon as its own are known, the picked one is trained with
    the other seeds and tested. Suites and their rivals come in their order, so that what is left out when
    time runs out is the last. A run that two suites have in common is done once.

    Args:
        suites: What is compared.
        store: Where outcomes are.
    """

    def __init__(self, suites: Sequence[Suite], store: Store) -> None:
        self._store = store
        self._outcomes: dict[str, Outcome] = {}
        self._failed: set[str] = set()
        self._busy: dict[str, Task] = {}
        self._flows: list[Frozen | Flow] = []
        for suite in suites:
            flows: list[Frozen | Flow] = [Frozen(suite)] if suite.frozen else []
            self._flows += [*flows, *(Flow(suite, rival) for rival in suite.rivals)]

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

    def left(self) -> Left:
        """Everything that is not done yet, with what is being done; every run once."""
        tasks: dict[str, Task] = {}
        later: dict[tuple[str, ...], list[Task]] = {}
        for flow in self._flows:
            for task in flow.tasks(self):
                old = tasks.get(task.run.key)
                tasks[task.run.key] = task if old is None or task.test else old
            expected = flow.later(self)
            # Suites with the same rival, rates and seeds will pick the same.
            later[tuple(task.run.key for task in expected)] = expected
        return Left(list(tasks.values()), [task for expected in later.values() for task in expected])

    def outcome(self, run: Run) -> Outcome:
        """What is known of a run."""
        if run.key not in self._outcomes:
            self._outcomes[run.key] = self._store.read(run)
        return self._outcomes[run.key]

    def known(self) -> list[tuple[Task, Outcome]]:
        """The runs that were done before, as far as they have been asked for, with their outcomes."""
        runs = {run.key: run for flow in self._flows for run in flow.runs()}
        outcomes = [(run, self.outcome(run)) for run in runs.values()]
        return [(Task(run, "tested" in found), found) for run, found in outcomes if "trained" in found]

    def is_open(self, task: Task) -> bool:
        """Whether something of a task is left; not if it has failed here."""
        outcome = self.outcome(task.run)
        done = "trained" in outcome and (not task.test or tested_with(outcome, task.run))
        return not done and task.run.key not in self._failed

    def _open(self) -> Iterator[Task]:
        for flow in self._flows:
            yield from flow.tasks(self)


class Frozen:
    """The test of a suite's base without training."""

    def __init__(self, suite: Suite) -> None:
        self._task = Task(frozen_run(suite), True)

    def tasks(self, plan: Plan) -> list[Task]:
        """What is left and can be named."""
        return [self._task] if plan.is_open(self._task) else []

    def later(self, plan: Plan) -> list[Task]:
        """What cannot be named yet."""
        return []

    def runs(self) -> list[Run]:
        """All runs that it may have."""
        return [self._task.run]


class Flow:
    """The runs of a rival in a suite: its learning rates, then every seed of the picked one."""

    def __init__(self, suite: Suite, rival: Rival) -> None:
        self._suite, self._rival = suite, rival
        self._sweep = [Task(run, False) for run in sweep(suite, rival)]
        self._expected = self._tests(rival.learning_rates[0])
        self._picked: list[Task] | None = None

    def tasks(self, plan: Plan) -> list[Task]:
        """What is left and can be named."""
        trying = [task for task in self._sweep if plan.is_open(task)]
        if trying:
            return trying
        if self._picked is None:
            rate = pick(self._rival, trials(self._suite, self._rival, plan.outcome))
            self._picked = [] if rate is None else self._tests(rate)
        return [task for task in self._picked if plan.is_open(task)]

    def later(self, plan: Plan) -> list[Task]:
        """What cannot be named yet, with a rate that may be another one in the end."""
        return self._expected if any(plan.is_open(task) for task in self._sweep) else []

    def runs(self) -> list[Run]:
        """All runs that it may have."""
        rival, seeds = self._rival, self._suite.seeds
        return [run_of(self._suite, rival, rate, seed) for rate in rival.learning_rates for seed in seeds]

    def _tests(self, rate: float) -> list[Task]:
        return [Task(run_of(self._suite, self._rival, rate, seed), True) for seed in self._suite.seeds]
