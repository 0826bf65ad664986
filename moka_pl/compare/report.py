"""What a comparison found: its rows, the paired differences, and the files that tell them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from moka_pl.compare.entries import Entry
from moka_pl.compare.gates import Gates, mean_gates
from moka_pl.compare.items import Items, stack_items
from moka_pl.compare.paired import Comparison, compare, resample
from moka_pl.compare.ranks import Ranks, mean_ranks
from moka_pl.compare.store import write_atomically
from moka_pl.compare.suite import Suite
from moka_pl.results import Share, over_seeds

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


def write_report(report: Report, folder: Path) -> list[Path]:
    """Writes `report.md`, `report.json` and the figures.

    Args:
        report: What to write.
        folder: Where to.

    Returns:
        The files.
    """
    from moka_pl.compare.figures import write_figures
    from moka_pl.compare.markdown import markdown

    files = [folder / "report.md", folder / "report.json"]
    write_atomically(files[0], markdown(report))
    write_atomically(files[1], lines_of(as_json(report)))
    return files + write_figures(report, folder)


def lines_of(value: dict[str, Any]) -> str:
    """JSON with a line for each element of the lists at its top: small, and still fit for comparing."""
    parts = []
    for key, part in value.items():
        if isinstance(part, list):
            lines = ",\n  ".join(json.dumps(element) for element in part)
            parts.append(f" {json.dumps(key)}: [\n  {lines}\n ]" if part else f" {json.dumps(key)}: []")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(part)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def as_json(report: Report) -> dict[str, Any]:
    """Everything but single items, as JSON values."""
    return {
        "suite": asdict(report.suite),
        "devices": report.devices,
        "versions": report.versions,
        "dates": report.dates,
        "missing": report.missing,
        "rows": [
            {
                "name": row.entry.name,
                "parameters": row.parameters,
                "learning_rate": row.entry.rate,
                "at_edge": row.entry.edge,
                "trials": [asdict(trial) for trial in row.entry.trials],
                "seeds": sorted(row.entry.outcomes),
                "validation_loss": row.validation,
                "acc_norm": {task: asdict(share) for task, share in row.tasks.items()},
                "mean": None if row.mean is None else asdict(row.mean),
                "nll": None if row.nll is None else asdict(row.nll),
                "seconds": [round(o["trained"]["seconds"], 1) for o in row.entry.outcomes.values()],
                "training_loss": row.curve,
                "gates": None if row.gates is None else asdict(row.gates),
                "ranks": None if row.ranks is None else asdict(row.ranks),
                "errors": row.entry.errors,
            }
            for row in report.rows
        ],
        "differences": [asdict(pair) for pair in report.pairs],
    }


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
