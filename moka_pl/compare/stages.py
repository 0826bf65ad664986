"""The order of a comparison: rates are tried, the best is picked on validation data, then it is tested."""

import statistics
from dataclasses import dataclass

from moka_pl.compare.runs import Run, frozen_run, run_of
from moka_pl.compare.store import Outcome, Store
from moka_pl.compare.suite import Rival, Suite
from moka_pl.compare.tasks import Progress, Task, do_all, warn


@dataclass(frozen=True)
class Trial:
    """A learning rate that was tried.

    Attributes:
        rate: The rate.
        loss: Mean validation loss over the seeds that pick; None if a run failed or diverged.
    """

    rate: float
    loss: float | None


@dataclass(frozen=True)
class Entry:
    """What became of a rival.

    Attributes:
        name: Its name.
        rate: The picked learning rate; None if no rate worked, and for the frozen base.
        edge: Whether the picked rate is the lowest or highest of several: a better one may lie beyond.
        trials: All rates that were tried.
        outcomes: Outcomes of the picked rate by seed, of the runs that were tested.
        errors: What went wrong, by run.
    """

    name: str
    rate: float | None
    edge: bool
    trials: tuple[Trial, ...]
    outcomes: dict[int, Outcome]
    errors: dict[str, str]


def run_suite(suite: Suite, store: Store, jobs: int = 1) -> list[Entry]:
    """Does what is left of a suite.

    Args:
        suite: What to compare.
        store: Where outcomes are, and stay.
        jobs: Runs at a time.

    Returns:
        An entry a rival, the frozen base first.

    Raises:
        KeyboardInterrupt: On Ctrl-C; what was done by then is kept.
    """
    first = first_stage(suite)
    left = [task for task in first if not task.is_done(store)]
    tests = sum(tests_left(suite, rival, store) for rival in suite.rivals)
    progress = Progress(len(left) + tests, tests + sum(task.test for task in left), jobs)
    do_all(first, store, jobs, progress)
    do_all(second_stage(suite, store), store, jobs, progress)
    entries = collect(suite, store)
    for name in matched_order(entries):
        warn(f"the runs of {name} were not on the same batches as those of the other rivals")
    return entries


def first_stage(suite: Suite) -> list[Task]:
    """Every learning rate of those rivals that have several, with the seeds that pick."""
    sweep = [
        Task(run_of(suite, rival, rate, seed), False)
        for rival in suite.rivals
        if len(rival.learning_rates) > 1
        for rate in rival.learning_rates
        for seed in suite.pick_seeds
    ]
    # The frozen base comes first: it tells how long a test takes.
    return [Task(frozen_run(suite), True), *sweep] if suite.frozen else sweep


def second_stage(suite: Suite, store: Store) -> list[Task]:
    """Every seed of every picked rate, trained as far as it is not and tested."""
    tasks = []
    for rival in suite.rivals:
        rate = pick(rival, trials(suite, rival, store))
        if rate is not None:
            tasks += [Task(run_of(suite, rival, rate, seed), True) for seed in suite.seeds]
    return tasks


def tests_left(suite: Suite, rival: Rival, store: Store) -> int:
    """How many tasks of the second stage a rival will have."""
    tried = trials(suite, rival, store)
    rate = pick(rival, tried)
    if rate is None or (len(tried) > 1 and any(trial.loss is None for trial in tried)):
        return len(suite.seeds)  # the pick is still open
    return sum(not Task(run_of(suite, rival, rate, seed), True).is_done(store) for seed in suite.seeds)


def trials(suite: Suite, rival: Rival, store: Store) -> tuple[Trial, ...]:
    """What every learning rate of a rival gave on the validation data, as far as it is known."""
    found = []
    for rate in rival.learning_rates:
        outcomes = [store.read(run_of(suite, rival, rate, seed)) for seed in suite.pick_seeds]
        losses = [outcome.get("trained", {}).get("validation_loss") for outcome in outcomes]
        known = [loss for loss in losses if loss is not None]
        found.append(Trial(rate, statistics.fmean(known) if len(known) == len(losses) else None))
    return tuple(found)


def pick(rival: Rival, tried: tuple[Trial, ...]) -> float | None:
    """The rate with the lowest validation loss; the only one without a look; None if none worked."""
    if len(rival.learning_rates) == 1:
        return rival.learning_rates[0]
    worked = [(trial.loss, trial.rate) for trial in tried if trial.loss is not None]
    return min(worked)[1] if worked else None


def collect(suite: Suite, store: Store) -> list[Entry]:
    """Everything that is known of a suite's rivals."""
    entries = []
    if suite.frozen:
        run = frozen_run(suite)
        outcomes, errors = _known([run], store)
        entries.append(Entry(run.rival, None, False, (), outcomes, errors))
    for rival in suite.rivals:
        tried = trials(suite, rival, store)
        rate = pick(rival, tried)
        ends = {min(rival.learning_rates), max(rival.learning_rates)}
        edge = len(rival.learning_rates) > 1 and rate in ends
        runs = [] if rate is None else [run_of(suite, rival, rate, seed) for seed in suite.seeds]
        outcomes, errors = _known(runs, store)
        others = [
            run_of(suite, rival, other, seed)
            for other in rival.learning_rates
            for seed in suite.pick_seeds
            if other != rate
        ]
        errors |= _known(others, store)[1]
        entries.append(Entry(rival.name, rate, edge, tried, outcomes, errors))
    return entries


def matched_order(entries: list[Entry]) -> list[str]:
    """Names of the rivals whose batches of some seed were not those of the first rival's."""
    first: dict[int, str] = {}
    different = []
    for entry in entries:
        digests = {seed: outcome["trained"].get("batches") for seed, outcome in entry.outcomes.items()}
        known = {seed: digest for seed, digest in digests.items() if digest is not None}
        if any(first.setdefault(seed, digest) != digest for seed, digest in known.items()):
            different.append(entry.name)
    return different


def _known(runs: list[Run], store: Store) -> tuple[dict[int, Outcome], dict[str, str]]:
    outcomes, errors = {}, {}
    for run in runs:
        outcome = store.read(run)
        if "error" in outcome:
            errors[str(run)] = outcome["error"]
        if store.is_tested(run):
            outcomes[run.seed] = outcome
    return outcomes, errors
