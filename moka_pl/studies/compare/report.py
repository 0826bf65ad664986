"""What a comparison found: its rows, the paired differences, and the files that tell them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from moka_pl.evaluation.results import Share, over_seeds
from moka_pl.studies.compare.entries import Entry
from moka_pl.studies.compare.gates import Gates, mean_gates
from moka_pl.studies.compare.items import Items, stack_items
from moka_pl.studies.compare.ranks import Ranks, mean_ranks
from moka_pl.studies.compare.statistics import Comparison, compare, resample
from moka_pl.studies.compare.suite import Suite

#: Points of a loss curve that are kept.
_POINTS = 100

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        entry: What became of the rival.
        parameters: Trainable parameters; None if nothing worked.
        tasks: acc_norm by task, over all seeds.
        mean: acc_norm of the plain mean over tasks; None for plain text.
        nll: Negative log-likelihood per token of the right answers; None if nothing worked.
        validation: Validation loss of every seed; None for one that diverged.
        curve: Mean training loss over the seeds, by step.
        gates: The gates' course; None without trained gates.
        ranks: Effective ranks of the trained updates; None where they are not known.
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


@dataclass(frozen=True)
class Report:
    """All rows, and the differences between rivals."""

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
        found: dict[str, set[str]] = {}
        for outcome in self._outcomes():
            for package, version in outcome["trained"].get("versions", {}).items():
                found.setdefault(package, set()).add(version)
        return {package: sorted(versions) for package, versions in found.items()}

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
    """Averages over seeds and compares the rivals on the same items.

    Args:
        suite: The suite; its ``reference`` says which pairs are compared.
        entries: What became of its rivals.
    """
    items = {entry.name: stack_items(dict(sorted(entry.items.items()))) for entry in entries if entry.items}
    rows = [_row(entry, items.get(entry.name)) for entry in entries]
    trained = {e.name: items[e.name] for e in entries if e.name in items and e.rate is not None}
    samples = resample(trained)
    if suite.reference in trained:
        names = [(name, suite.reference) for name in trained if name != suite.reference]
    else:
        names = list(combinations(trained, 2))
    pairs = [compare(samples, one, other) for one, other in names]
    return Report(suite, rows, [pair for pair in pairs if pair is not None])


def _row(entry: Entry, items: Items | None) -> Row:
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
