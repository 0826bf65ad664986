"""What a comparison found: table, paired differences, JSON and figures."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from moka_pl.benchmark.machine import versions
from moka_pl.compare.items import Items, stack_items
from moka_pl.compare.paired import Comparison, compare, resample
from moka_pl.compare.stages import Entry
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
        curve: Mean training loss over the seeds, by step.
    """

    entry: Entry
    parameters: int | None
    tasks: dict[str, Share]
    mean: Share | None
    nll: Share | None
    curve: Curve


@dataclass(frozen=True)
class Report:
    """All rows, and the differences between rivals."""

    suite: Suite
    rows: list[Row]
    pairs: list[Comparison]

    @property
    def devices(self) -> list[str]:
        """What the runs ran on."""
        outcomes = [outcome for row in self.rows for outcome in row.entry.outcomes.values()]
        return sorted({outcome["trained"]["device"] for outcome in outcomes})


def make_report(suite: Suite, entries: Sequence[Entry]) -> Report:
    """Averages over seeds and compares the rivals on the same items.

    Args:
        suite: The suite; its ``reference`` says which pairs are compared.
        entries: What became of its rivals.
    """
    items = {entry.name: _items(entry) for entry in entries if entry.outcomes}
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

    files = [folder / "report.md", folder / "report.json"]
    write_atomically(files[0], markdown(report))
    write_atomically(files[1], json.dumps(as_json(report), indent=1) + "\n")
    return files + write_figures(report, folder)


def markdown(report: Report) -> str:
    """The table and the differences, as text."""
    suite = report.suite
    tasks = list(dict.fromkeys(task for row in report.rows for task in row.tasks))
    several = len(tasks) > 1
    heads = ["", "trainable", "learning rate", *tasks, *(["mean"] if several else []), "NLL"]
    lines = [f"# {suite.name}", "", *([suite.about, ""] if suite.about else [])]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(_cells(row, tasks, several))} |" for row in report.rows]
    lines += ["", *_notes(report)]
    if report.pairs:
        lines += ["", "## Differences on the same items", "", *_pair_lines(report.pairs)]
    failed = [(run, error) for row in report.rows for run, error in row.entry.errors.items()]
    if failed:
        lines += ["", "## Failed runs", "", *(f"- {run}: {error}" for run, error in failed)]
    return "\n".join(lines) + "\n"


def as_json(report: Report) -> dict[str, Any]:
    """Everything but single items, as JSON values."""
    return {
        "suite": asdict(report.suite),
        "devices": report.devices,
        "versions": versions(),
        "rows": [
            {
                "name": row.entry.name,
                "parameters": row.parameters,
                "learning_rate": row.entry.rate,
                "at_edge": row.entry.edge,
                "trials": [asdict(trial) for trial in row.entry.trials],
                "seeds": sorted(row.entry.outcomes),
                "acc_norm": {task: asdict(share) for task, share in row.tasks.items()},
                "mean": None if row.mean is None else asdict(row.mean),
                "nll": None if row.nll is None else asdict(row.nll),
                "seconds": [o["trained"]["seconds"] for o in row.entry.outcomes.values()],
                "training_loss": row.curve,
                "errors": row.entry.errors,
            }
            for row in report.rows
        ],
        "differences": [asdict(pair) for pair in report.pairs],
    }


def _items(entry: Entry) -> Items:
    return stack_items({seed: outcome["tested"]["items"] for seed, outcome in sorted(entry.outcomes.items())})


def _row(entry: Entry, items: Items | None) -> Row:
    outcomes = [outcome for _, outcome in sorted(entry.outcomes.items())]
    if not outcomes or items is None:
        return Row(entry, None, {}, None, None, [])
    tested = [outcome["tested"] for outcome in outcomes]
    tasks = {task: over_seeds([_share(t["tasks"][task]) for t in tested]) for task in tested[0]["tasks"]}
    mean = over_seeds([_share(t["mean"]) for t in tested]) if tasks else None
    curve = _mean_curve([outcome["trained"].get("losses", []) for outcome in outcomes])
    parameters = outcomes[0]["trained"]["parameters"]
    return Row(entry, parameters, tasks, mean, items.nll_per_token(), curve)


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


def _cells(row: Row, tasks: Sequence[str], several: bool) -> list[str]:
    entry = row.entry
    if row.parameters is None:
        why = next(iter(entry.errors.values()), "not run yet")
        shown = f"failed: {why}" if entry.errors else why
        return [entry.name, shown.replace("|", "\\|"), *[""] * (len(tasks) + several + 2)]
    rate = "" if entry.rate is None else f"{entry.rate:g}{' *' if entry.edge else ''}"
    name = entry.name if not entry.errors else f"{entry.name} (some runs failed)"
    shares = [row.tasks.get(task) for task in tasks] + ([row.mean] if several else [])
    return [name, f"{row.parameters:,}", rate, *(_percent(share) for share in shares), _plain(row.nll)]


def _notes(report: Report) -> list[str]:
    suite = report.suite
    seeds = ", ".join(str(seed) for seed in suite.seeds)
    by = f"seed {suite.seeds[0]}" if suite.pick == "first" else "all seeds"
    notes = [
        f"acc_norm in % and negative log-likelihood per token of the right answers (NLL), ± standard error; "
        f"means over the seeds {seeds}. Learning rates were picked by the validation loss of {by}, on data "
        "held out of the training data; all rivals of a seed had the same batches."
    ]
    if any(row.entry.edge for row in report.rows):
        notes.append("\\* lowest or highest of the rates that were tried: a better one may lie beyond.")
    found = versions()
    shown = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "peft") if name in found)
    notes.append(f"Device: {'; '.join(report.devices) or 'none'}. {shown}.")
    return [line for note in notes for line in (note, "")][:-1]


def _pair_lines(pairs: Sequence[Comparison]) -> list[str]:
    answered = any(pair.acc_norm is not None for pair in pairs)
    heads = ["NLL", "95% interval", "p"]
    if answered:
        heads = ["acc_norm", "95% interval", "p", "items won : lost", "sign test p", *heads]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for pair in pairs:
        cells = [f"{pair.one} − {pair.other}"]
        if pair.acc_norm is not None and pair.sign_p is not None:
            d = pair.acc_norm
            cells += [f"{100 * d.value:+.2f}", f"{100 * d.low:+.2f} to {100 * d.high:+.2f}", _p(d.p)]
            cells += [f"{pair.wins} : {pair.losses}", _p(pair.sign_p)]
        elif answered:
            cells += [""] * 5
        d = pair.nll
        cells += [f"{d.value:+.4f}", f"{d.low:+.4f} to {d.high:+.4f}", _p(d.p)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Paired bootstrap over items (within tasks) and seeds, and an exact sign test on the items that one "
        "of both has right more often over the seeds. The p-values are for single pairs; with "
        f"{len(pairs)} of them, one below {0.05 / len(pairs):.2g} is significant at 5% for all together.",
    ]
    return lines


def _percent(share: Share | None) -> str:
    if share is None:
        return ""
    return f"{100 * share.value:.1f} ± {100 * (share.stderr or 0):.1f}"


def _plain(share: Share | None) -> str:
    return "" if share is None else f"{share.value:.3f} ± {share.stderr or 0:.3f}"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"
