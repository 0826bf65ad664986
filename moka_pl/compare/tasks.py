"""What is left to do, done in this process or in several, with the time that it will still take."""

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from moka_pl.compare.runs import Run
from moka_pl.compare.store import Outcome, Store
from moka_pl.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """A run that is to be trained, or trained and tested."""

    run: Run
    test: bool

    def is_done(self, store: Store) -> bool:
        """Whether nothing of it is left to do; runs that failed are tried again."""
        return store.is_trained(self.run) and (not self.test or store.is_tested(self.run))


class Progress:
    """Prints a line a task, with the time that all that are left will take.

    Args:
        total: Tasks of all stages that are to be done.
        tests: Those of them that test.
        jobs: Tasks at a time.
    """

    def __init__(self, total: int, tests: int, jobs: int) -> None:
        self.total, self.tests, self.jobs = total, tests, jobs
        self.done = self.tested = 0
        self._training: list[float] = []
        self._testing: list[float] = []

    def add(self, task: Task, outcome: Outcome, seconds: float) -> None:
        """Prints what became of a task.

        Args:
            task: The task.
            outcome: What it returned.
            seconds: How long it took.
        """
        self.done += 1
        self.tested += task.test
        found = outcome.get("error")
        if found is None:
            test = outcome["tested"]["seconds"] if task.test else 0.0
            if task.test:
                self._testing.append(test)
            if task.run.rate is not None and seconds > test:
                self._training.append(seconds - test)
            found = _words(outcome)
        else:
            found = f"FAILED: {found}"
        print(f"[{self.done}/{self.total}] {task.run}: {found} ({_time(seconds)}){self._left()}", flush=True)

    def _left(self) -> str:
        left = self.total - self.done
        if not left or not (self._training or self._testing):
            return ""
        seconds = left * fmean(self._training or [0.0])
        seconds += (self.tests - self.tested) * fmean(self._testing or [0.0])
        return f"; about {_time(seconds / self.jobs)} left"


def do_all(tasks: Sequence[Task], store: Store, jobs: int, progress: Progress) -> None:
    """Does those tasks that are not done yet; those with the same base follow each other.

    Args:
        tasks: What to do.
        store: Where outcomes are.
        jobs: Processes at a time; 1 works in this one.
        progress: Is told of every task.

    Raises:
        KeyboardInterrupt: On Ctrl-C; what was done by then is kept.
        ConfigError: If a process dies.
    """
    # Rivals of two names may be the same: one run serves both.
    left = list({task.run.key: task for task in tasks if not task.is_done(store)}.values())
    left.sort(key=lambda task: repr(task.run.settings["backbone"]))
    done = _here(left, store) if jobs == 1 else _elsewhere(left, store, min(jobs, len(left)))
    for task, outcome, seconds in done:
        progress.add(task, outcome, seconds)


def _here(tasks: Sequence[Task], store: Store) -> Iterator[tuple[Task, Outcome, float]]:
    if not tasks:
        return
    execute = _executor(store)
    for task in tasks:
        yield task, *_timed(execute, task)


def _elsewhere(tasks: Sequence[Task], store: Store, jobs: int) -> Iterator[tuple[Task, Outcome, float]]:
    if not tasks:
        return
    # Spawned: a forked process cannot use a GPU that its parent has used.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _start_worker, (store.folder.parent,)) as pool:
        try:
            futures = {pool.submit(_work, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], *future.result()
        except BrokenProcessPool as error:
            raise ConfigError(
                "a process of --jobs died, perhaps for want of memory; what was done is kept. Run the same "
                "command with fewer jobs"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


_execute: Callable[[Run, bool], Outcome] | None = None


def _start_worker(folder: Path) -> None:
    global _execute
    _execute = _executor(Store(folder))


def _work(task: Task) -> tuple[Outcome, float]:
    assert _execute is not None
    return _timed(_execute, task)


def _timed(execute: Callable[[Run, bool], Outcome], task: Task) -> tuple[Outcome, float]:
    start = time.monotonic()
    handler = signal.getsignal(signal.SIGINT)
    try:
        outcome = execute(task.run, task.test)
    except SystemExit as error:
        # Lightning ends the process on Ctrl-C, and lets no second one through.
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error
    # Items stay on disk: they need not travel between processes.
    kept = {key: part for key, part in outcome.items() if key != "tested"}
    if "tested" in outcome:
        kept["tested"] = {key: part for key, part in outcome["tested"].items() if key != "items"}
    return kept, time.monotonic() - start


def _executor(store: Store) -> Callable[[Run, bool], Outcome]:
    from moka_pl.compare.execute import Executor

    return Executor(store)


def _words(outcome: Outcome) -> str:
    trained, tested = outcome["trained"], outcome.get("tested")
    words = []
    if "validation_loss" in trained:
        loss = trained["validation_loss"]
        words.append("diverged" if loss is None else f"validation loss {loss:.4f}")
    if tested and "acc_norm" in tested["mean"]:
        words.append(f"test acc_norm {100 * tested['mean']['acc_norm']:.1f}")
    return ", ".join(words) or "done"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def warn(text: str) -> None:
    """Prints a warning on stderr."""
    print(f"compare: warning: {text}", file=sys.stderr, flush=True)
