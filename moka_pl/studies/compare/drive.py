"""Does what is left of suites, in this process or in several."""

import signal
import time
from collections.abc import Callable, Sequence

from moka_pl.studies.compare.report import collect, matched_order
from moka_pl.studies.compare.runs import Outcome, Run, Store, warn
from moka_pl.studies.compare.schedule import Clock, Plan, Progress, Task, Times
from moka_pl.studies.compare.suite import Suite
from moka_pl.studies.compare.workers import Workers


def run_suites(
    suites: Sequence[Suite],
    store: Store,
    jobs: int = 1,
    devices: Sequence[int] | None = None,
    clock: Clock | None = None,
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Does what is left of some suites, as far as the time reaches.

    Args:
        suites: What to compare, the most important first.
        store: Where outcomes are, and stay.
        jobs: Runs at a time, each in a process of its own.
        devices: Numbers of the GPUs that the processes are spread over; None leaves the choice to each.
        clock: Tells how much time is left.
        begin: Called once if anything is left to do, before the first run and while processes start.

    Raises:
        KeyboardInterrupt: On Ctrl-C; what was done by then is kept.
        ConfigError: If processes cannot work at all.
    """
    work = _TimedPlan(Plan(suites, store), clock or Clock(), jobs)
    if not work.plan.remaining().tasks:
        print("everything is done")
    elif jobs == 1 and devices is None:
        begin()
        _run_here(work, store)
    else:
        _run_in_workers(work, store, jobs, devices, begin)
    work.close()
    if count := len((remaining := work.plan.remaining()).tasks) + len(remaining.later):
        warn(f"time is up with {count} runs left; run the same command again to continue")
    for suite in suites:
        for name in matched_order(collect(suite, store)):
            warn(f"{suite.name}: {name} was trained on other batches than the other methods")


class _TimedPlan:
    """The plan, with what is known of how long its tasks take."""

    def __init__(self, plan: Plan, clock: Clock, jobs: int) -> None:
        self.plan, self.clock, self._times = plan, clock, Times()
        for task, outcome in plan.known():
            self._times.add(task, outcome, {})
        self._progress = Progress(plan.remaining, lambda task: plan.outcome(task.run), self._times, jobs)

    def next(self) -> Task | None:
        """The next task that will probably end in time."""
        return self.plan.next(
            lambda task: self.clock.has(self._times.expected(task, self.plan.outcome(task.run)))
        )

    def end(self, task: Task, outcome: Outcome, seconds: float) -> None:
        """Notes and tells what became of a task.

        Args:
            task: The task.
            outcome: What is known of its run now.
            seconds: How long it took.
        """
        self._times.add(task, outcome, self.plan.outcome(task.run))
        self.plan.end(task, outcome)
        self._progress.add(task, outcome, seconds)

    def close(self) -> None:
        """Tells how long everything took."""
        self._progress.close()


def _run_here(work: _TimedPlan, store: Store) -> None:
    execute = _executor(store)
    while (task := work.next()) is not None:
        start = time.monotonic()
        handler = signal.getsignal(signal.SIGINT)
        try:
            outcome = execute(task.run, task.test)
        except SystemExit as error:
            # Lightning ends the process on Ctrl-C, and ignores a second one.
            signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt from error
        work.end(task, outcome, time.monotonic() - start)


def _run_in_workers(
    work: _TimedPlan, store: Store, jobs: int, devices: Sequence[int] | None, begin: Callable[[], None]
) -> None:
    remaining = work.plan.remaining()
    jobs = min(jobs, len(remaining.tasks) + len(remaining.later))
    workers = Workers(store.folder.parent, jobs, devices)
    try:
        begin()
        while True:
            for number in workers.idle:
                if (task := work.next()) is not None:
                    workers.give(number, task)
            if not workers.busy and workers.idle:
                return
            for ended in workers.wait(work.clock.left()):
                work.end(ended.task, ended.outcome, ended.seconds)
            if work.clock.left() == 0:
                for task in workers.busy:
                    warn(f"time is up before {task.run} ended; the next call restarts it")
                return
    finally:
        workers.stop()


def _executor(store: Store) -> Callable[[Run, bool], Outcome]:
    from moka_pl.studies.compare.train import Executor

    return Executor(store)
