"""What a comparison gives: a row a method, averaged over seeds, and the paired differences.

Entries say what became of every method; gates and ranks are means over the seeds that were tested.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Any

from moka_pl.evaluation.results import Share, over_seeds
from moka_pl.studies.compare.runs import (
    ItemColumns,
    Outcome,
    Run,
    Store,
    Trial,
    all_rates,
    at_edge,
    frozen_run,
    pick,
    run_of,
    sweep,
    tested_with,
    trials,
)
from moka_pl.studies.compare.statistics import (
    Comparison,
    Forgotten,
    Items,
    compare,
    forgotten,
    resample,
    stack_items,
)
from moka_pl.studies.compare.suite import Method, Suite


@dataclass(frozen=True)
class Entry:
    """What became of a method.

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
    """Everything that is known of a suite's methods, the frozen base first."""
    entries = [_frozen(suite, store)] if suite.frozen else []
    return entries + [_entry(suite, method, store) for method in suite.methods]


def matched_order(entries: list[Entry]) -> list[str]:
    """Names of the methods whose batches of some seed were not those of the first method's."""
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
    known = _StoredRuns([run], store)
    missing = () if known.outcomes or known.errors else (f"{run}: test",)
    return Entry(run.method, None, False, (), known.outcomes, known.items, known.errors, missing)


def _entry(suite: Suite, method: Method, store: Store) -> Entry:
    method = all_rates(suite, method, store.read)
    tried = trials(suite, method, store.read)
    rate = pick(method, tried)
    swept = [run for run in sweep(suite, method) if run.rate != rate or run.seed not in suite.seeds]
    others = _StoredRuns(swept, store)
    missing = [str(run) for run in swept if not others.is_trained(run) and str(run) not in others.errors]
    runs = [] if rate is None else [run_of(suite, method, rate, seed) for seed in suite.seeds]
    known = _StoredRuns(runs, store)
    untested = [run for run in runs if run.seed not in known.outcomes and str(run) not in known.errors]
    if missing:  # what is picked of some rates may not be what is picked of all
        missing.append(
            f"{method.name}: the picked learning rate with {len(suite.seeds)} seeds, and its tests"
        )
    else:
        missing += [f"{run}{': test' if known.is_trained(run) else ''}" for run in untested]
    edge, errors = at_edge(method, rate), known.errors | others.errors
    return Entry(method.name, rate, edge, tried, known.outcomes, known.items, errors, tuple(missing))


class _StoredRuns:
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


#: Points of the gates' curves that are kept.
_GATE_POINTS = 40


@dataclass(frozen=True)
class Gates:
    """The gates of a method.

    Attributes:
        steps: Optimizer steps.
        entropy: Mean normalised entropy over layers and seeds at each.
        shapes: Mean gate of every kind of layer and shape of component at each, 1 where it is uniform.
        final: The last of these with its standard deviation over the seeds (0 for one seed).
        final_entropy: Mean and extremes of the last entropies over layers and seeds.
    """

    steps: list[int]
    entropy: list[float | None]
    shapes: dict[str, list[float | None]]
    final: dict[str, tuple[float | None, float]]
    final_entropy: dict[str, float]


def mean_gates(seeds: Sequence[dict[str, Any]]) -> Gates | None:
    """The mean over seeds at the steps that all of them have.

    Args:
        seeds: What :meth:`~moka_pl.studies.compare.train.RunRecorder.gates` noted, by seed.

    Returns:
        The mean; None without any.
    """
    if not seeds:
        return None
    steps = sorted(set.intersection(*(set(seed["steps"]) for seed in seeds)))
    kept = sorted({steps[round(i * (len(steps) - 1) / (_GATE_POINTS - 1))] for i in range(_GATE_POINTS)})

    def curve(series: Sequence[Sequence[float | None]]) -> list[float | None]:
        known = [dict(zip(s["steps"], values, strict=True)) for s, values in zip(seeds, series, strict=True)]
        return [_mean([values[step] for values in known]) for step in kept]

    names = [name for name in seeds[0]["shapes"] if all(name in seed["shapes"] for seed in seeds)]
    finals = {name: [seed["shapes"][name][-1] for seed in seeds] for name in names}
    last = [value for seed in seeds for value in seed["final_entropy"] if value is not None]
    return Gates(
        kept,
        curve([seed["entropy"] for seed in seeds]),
        {name: curve([seed["shapes"][name] for seed in seeds]) for name in names},
        {name: (_mean(values), _spread(values)) for name, values in finals.items()},
        {"mean": fmean(last), "lowest": min(last), "highest": max(last)} if last else {},
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(fmean(known), 5) if len(known) == len(values) else None


def _spread(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return round(stdev(known), 5) if len(known) > 1 else 0.0


_RANKS = ("stable_rank", "entropy_rank")


@dataclass(frozen=True)
class Ranks:
    """Effective ranks of a method's ΔW.

    Attributes:
        stable: Mean stable rank over layers and seeds, and its standard deviation over the seeds.
        entropy: The same of the entropy rank.
        norm: The same of the Frobenius norm.
        kinds: Means of the stable and the entropy rank by kind of layer.
        spectra: Mean of σ_i / σ_1 by kind of layer, at some ``index`` i from 1.
    """

    stable: tuple[float, float]
    entropy: tuple[float, float]
    norm: tuple[float, float]
    kinds: dict[str, tuple[float, float]]
    spectra: dict[str, dict[str, list[float]]]


def mean_ranks(seeds: Sequence[dict[str, Any]]) -> Ranks | None:
    """The means over seeds.

    Args:
        seeds: What :func:`~moka_pl.studies.spectra.spectra_summary` returned, by seed.

    Returns:
        The means; None where no layer has an update.
    """
    if not seeds or not seeds[0]["layers"]:
        return None
    names = seeds[0]["layers"]
    kinds = {}
    for kind in dict.fromkeys(name.rpartition(".")[2] for name in names):
        layers = [i for i, name in enumerate(names) if name.rpartition(".")[2] == kind]
        means = [fmean(seed[which][i] for seed in seeds for i in layers) for which in _RANKS]
        kinds[kind] = (round(means[0], 3), round(means[1], 3))
    stable, entropy, norm = (
        _over_seeds([fmean(seed[which]) for seed in seeds]) for which in (*_RANKS, "norm")
    )
    spectra = {kind: _mean_spectrum([seed["kinds"].get(kind) for seed in seeds]) for kind in kinds}
    return Ranks(stable, entropy, norm, kinds, {kind: values for kind, values in spectra.items() if values})


def _over_seeds(values: Sequence[float]) -> tuple[float, float]:
    return round(fmean(values), 4), round(stdev(values), 4) if len(values) > 1 else 0.0


def _mean_spectrum(spectra: Sequence[dict[str, list[float]] | None]) -> dict[str, list[float]]:
    known = [spectrum for spectrum in spectra if spectrum]
    if not known or any(spectrum["index"] != known[0]["index"] for spectrum in known):
        return {}
    sizes = zip(*(spectrum["size"] for spectrum in known), strict=True)
    return {"index": known[0]["index"], "size": [float(f"{fmean(values):.3g}") for values in sizes]}


#: Points of a loss curve that are kept.
_POINTS = 100

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        entry: What became of the method.
        parameters: Trainable parameters; None if nothing worked.
        tasks: acc_norm by task, over all seeds.
        mean: acc_norm of the plain mean over tasks; None for plain text.
        nll: Negative log-likelihood per token of the right answers; None if nothing worked.
        validation: Validation loss of every seed; None for one that diverged.
        curve: Mean training loss over the seeds, by step.
        gates: The gates over the steps; None without trained gates.
        ranks: Effective ranks of the trained updates; None where they are not known.
        forgotten: Likelihood of plain text before and after; None where it was not looked at.
    """

    entry: Entry
    parameters: int | None
    tasks: dict[str, Share]
    mean: Share | None
    nll: Share | None
    validation: list[float | None]
    curve: Curve
    gates: Gates | None
    ranks: Ranks | None
    forgotten: Forgotten | None = None


@dataclass(frozen=True)
class Report:
    """All rows, and the differences between methods."""

    suite: Suite
    rows: list[Row]
    pairs: list[Comparison]

    @property
    def devices(self) -> list[str]:
        """What the runs ran on."""
        return sorted({outcome["trained"]["device"] for outcome in self._outcomes()})

    @property
    def versions(self) -> dict[str, list[str]]:
        """Versions that the runs ran with, by package; usually one of each."""
        by_package: dict[str, set[str]] = {}
        for outcome in self._outcomes():
            for package, version in outcome["trained"].get("versions", {}).items():
                by_package.setdefault(package, set()).add(version)
        return {package: sorted(versions) for package, versions in by_package.items()}

    @property
    def dates(self) -> list[str]:
        """Days of the runs."""
        days = {outcome["trained"].get("date") for outcome in self._outcomes()}
        return sorted(day for day in days if day)

    @property
    def missing(self) -> list[str]:
        """Runs and tests that are still to be done."""
        return [run for row in self.rows for run in row.entry.missing]

    def _outcomes(self) -> list[dict[str, Any]]:
        return [outcome for row in self.rows for outcome in row.entry.outcomes.values()]


def make_report(suite: Suite, entries: Sequence[Entry]) -> Report:
    """Averages over seeds and compares the methods on the same items.

    Args:
        suite: The suite; its ``reference`` says which pairs are compared.
        entries: What became of its methods.
    """
    items = {entry.name: stack_items(dict(sorted(entry.items.items()))) for entry in entries if entry.items}
    reference = next((entry.items for entry in entries if entry.name == suite.reference), None)
    rows = [_row(entry, items.get(entry.name), reference) for entry in entries]
    trained = {e.name: items[e.name] for e in entries if e.name in items and e.rate is not None}
    samples = resample(trained)
    if suite.reference in trained:
        names = [(name, suite.reference) for name in trained if name != suite.reference]
    else:
        names = list(combinations(trained, 2))
    pairs = [compare(samples, one, other) for one, other in names]
    return Report(suite, rows, [pair for pair in pairs if pair is not None])


def _row(entry: Entry, items: Items | None, reference: dict[int, ItemColumns] | None) -> Row:
    outcomes = [outcome for _, outcome in sorted(entry.outcomes.items())]
    if not outcomes or items is None:
        return Row(entry, None, {}, None, None, [], [], None, None)
    tested = [outcome["tested"] for outcome in outcomes]
    trained = [outcome["trained"] for outcome in outcomes]
    tasks = {task: over_seeds([_share(t["tasks"][task]) for t in tested]) for task in tested[0]["tasks"]}
    mean = over_seeds([_share(t["mean"]) for t in tested]) if tasks else None
    return Row(
        entry,
        trained[0]["parameters"],
        tasks,
        mean,
        items.nll_per_token(),
        [t["validation_loss"] for t in trained if "validation_loss" in t],
        _mean_curve([t.get("losses", []) for t in trained]),
        mean_gates([t["gates"] for t in trained if t.get("gates")]),
        mean_ranks([t["spectra"] for t in trained if t.get("spectra")]),
        forgotten(entry.items, None if entry.items is reference else reference),
    )


def _share(scores: dict[str, float]) -> Share:
    return Share(scores["acc_norm"], scores.get("acc_norm_stderr"))


def _mean_curve(curves: Sequence[Sequence[tuple[int, float | None]]]) -> Curve:
    """The mean over seeds at steps that all have, and over neighbouring steps where there are many."""
    known = [{step: loss for step, loss in curve if loss is not None} for curve in curves]
    steps = sorted(set.intersection(*(set(curve) for curve in known))) if known else []
    points = [(step, sum(curve[step] for curve in known) / len(known)) for step in steps]
    size = -(-len(points) // _POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in g) / len(g), round(sum(v for _, v in g) / len(g), 5)) for g in groups]
