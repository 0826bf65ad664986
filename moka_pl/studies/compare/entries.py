"""What became of a suite's rivals."""

from dataclasses import dataclass

from moka_pl.studies.compare.picks import Trial, pick, sweep, trials
from moka_pl.studies.compare.runs import Run, frozen_run, run_of
from moka_pl.studies.compare.store import ItemColumns, Outcome, Store, tested_with
from moka_pl.studies.compare.suite import Rival, Suite


@dataclass(frozen=True)
class Entry:
    """What became of a rival.

    Attributes:
        name: Its name.
        rate: The picked learning rate; None if no rate worked, and for the frozen base.
        edge: Whether the picked rate is the lowest or highest of several: a better one may lie beyond.
        trials: All rates that were tried.
        outcomes: Outcomes of the picked rate by seed, of the runs that were tested.
        items: What every test item of these runs scored, by seed.
        errors: What went wrong, by run.
        missing: Runs and tests that are still to be done.
    """

    name: str
    rate: float | None
    edge: bool
    trials: tuple[Trial, ...]
    outcomes: dict[int, Outcome]
    items: dict[int, ItemColumns]
    errors: dict[str, str]
    missing: tuple[str, ...]


def collect(suite: Suite, store: Store) -> list[Entry]:
    """Everything that is known of a suite's rivals, the frozen base first."""
    entries = [_frozen(suite, store)] if suite.frozen else []
    return entries + [_entry(suite, rival, store) for rival in suite.rivals]


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


def _frozen(suite: Suite, store: Store) -> Entry:
    run = frozen_run(suite)
    known = _Known([run], store)
    missing = () if known.outcomes or known.errors else (f"{run}: test",)
    return Entry(run.rival, None, False, (), known.outcomes, known.items, known.errors, missing)


def _entry(suite: Suite, rival: Rival, store: Store) -> Entry:
    tried = trials(suite, rival, store.read)
    rate = pick(rival, tried)
    swept = [run for run in sweep(suite, rival) if run.rate != rate or run.seed not in suite.seeds]
    others = _Known(swept, store)
    missing = [str(run) for run in swept if not others.is_trained(run) and str(run) not in others.errors]
    runs = [] if rate is None else [run_of(suite, rival, rate, seed) for seed in suite.seeds]
    known = _Known(runs, store)
    untested = [run for run in runs if run.seed not in known.outcomes and str(run) not in known.errors]
    if missing:  # what is picked of some rates may not be what is picked of all
        missing.append(f"{rival.name}: the picked learning rate with {len(suite.seeds)} seeds, and its tests")
    else:
        missing += [f"{run}{': test' if known.is_trained(run) else ''}" for run in untested]
    edge = len(rival.learning_rates) > 1 and rate in {min(rival.learning_rates), max(rival.learning_rates)}
    errors = known.errors | others.errors
    return Entry(rival.name, rate, edge, tried, known.outcomes, known.items, errors, tuple(missing))


class _Known:
    """What the store knows of some runs."""

    def __init__(self, runs: list[Run], store: Store) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.items: dict[int, ItemColumns] = {}
        self.errors: dict[str, str] = {}
        self._trained: set[str] = set()
        for run in runs:
            outcome = store.read(run)
            if "error" in outcome:
                self.errors[str(run)] = outcome["error"]
            if "trained" in outcome:
                self._trained.add(run.key)
            items = store.read_items(run) if tested_with(outcome, run) else {}
            if items:
                self.outcomes[run.seed], self.items[run.seed] = outcome, items

    def is_trained(self, run: Run) -> bool:
        """Whether a run's training has ended well."""
        return run.key in self._trained
