"""A comparison as text."""

from collections.abc import Sequence
from itertools import groupby
from statistics import median

from moka_pl.evaluation.results import Share
from moka_pl.studies.compare.report import Entry, Report, Row, matched_order
from moka_pl.studies.compare.statistics import Comparison

_SHOWN_VERSIONS = ("torch", "transformers", "bitsandbytes", "peft", "lightning")


def markdown(report: Report) -> str:
    """The tables, as text."""
    suite = report.suite
    tasks = list(dict.fromkeys(task for row in report.rows for task in row.tasks))
    several = len(tasks) > 1
    heads = ["", "trainable", "learning rate", *tasks, *(["mean"] if several else []), "NLL", "validation"]
    count = len(suite.seeds)
    lines = [f"# {suite.name}", "", *([suite.about, ""] if suite.about else [])]
    lines += _table(heads, [_cells(row, tasks, several, count) for row in report.rows])
    lines += ["", *_notes(report)]
    if report.pairs:
        lines += ["", "## Differences on the same items", "", *_pair_lines(report.pairs, suite.score_name)]
    scored = [row for row in report.rows if row.forgotten is not None and row.entry.rate is not None]
    if scored:
        lines += ["", "## Plain text, before and after", "", *_forgotten_lines(scored, suite.reference)]
    swept = [row.entry for row in report.rows if len(row.entry.trials) > 1]
    if swept:
        heads = ["", "validation loss by learning rate"]
        lines += ["", "## Learning rates", "", *_table(heads, [[e.name, _trials(e)] for e in swept])]
    timed = [row for row in report.rows if row.entry.rate is not None and row.entry.outcomes]
    if timed:
        lines += ["", "## Time and memory", "", *_cost_lines(timed)]
    gated = [row for row in report.rows if row.gates is not None]
    if gated:
        lines += ["", "## Gates", "", *_gate_lines(gated)]
    ranked = [row for row in report.rows if row.ranks is not None]
    if ranked:
        lines += ["", "## Ranks of the trained updates", "", *_rank_lines(ranked)]
    if report.missing:
        lines += ["", "## Not done yet", "", *(f"- {run}" for run in report.missing)]
    failed = [(run, error) for row in report.rows for run, error in row.entry.errors.items()]
    if failed:
        lines += ["", "## Failed runs", "", *(f"- {run}: {error}" for run, error in failed)]
    return "\n".join(lines) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(r)} |" for r in escaped)]


def _cells(row: Row, tasks: Sequence[str], several: bool, seeds: int) -> list[str]:
    entry = row.entry
    if row.parameters is None:
        why = next(iter(entry.errors.values()), None)
        shown = f"failed: {why}" if why else "not tested yet" if entry.rate else "not run yet"
        return [entry.name, shown, *[""] * (len(tasks) + several + 3)]
    rate = "" if entry.rate is None else f"{entry.rate:g}{' *' if entry.edge else ''}"
    shares = [row.tasks.get(task) for task in tasks] + ([row.mean] if several else [])
    known = [loss for loss in row.validation if loss is not None]
    validation = f"{sum(known) / len(known):.4f}" if known and len(known) == len(row.validation) else ""
    parameters = f"{row.parameters:,}"
    name = told_name(entry, seeds)
    return [name, parameters, rate, *(_percent(share) for share in shares), _plain(row.nll), validation]


def told_name(entry: Entry, seeds: int) -> str:
    """A method's name, with what is still missing of its runs.

    Args:
        entry: What became of the method.
        seeds: Number of seeds that the suite asks for.
    """
    notes = ["some runs failed"] if entry.errors else []
    if len(entry.trials) > 1 and entry.missing and any(trial.loss is None for trial in entry.trials):
        notes.append("not all rates tried")
    if entry.rate is not None and len(entry.outcomes) < seeds:
        notes.append(f"{len(entry.outcomes)} of {seeds} seeds")
    return f"{entry.name} ({', '.join(notes)})" if notes else entry.name


def _notes(report: Report) -> list[str]:
    suite = report.suite
    seeds = ", ".join(str(seed) for seed in suite.seeds)
    which = f"means over the seeds {seeds}" if len(suite.seeds) > 1 else f"seed {seeds}"
    by = f"seed {suite.seeds[0]}" if suite.pick == "first" else "all seeds"
    answered = any(row.tasks for row in report.rows)
    name = suite.score_name.capitalize() if suite.generate else suite.score_name
    scores = f"{name} in % and negative log-likelihood per token of the right answers (NLL)"
    notes = [
        f"{scores if answered else 'Negative log-likelihood per token (NLL)'}, ± standard error; "
        f"{which}. Learning rates were picked by the validation loss of {by}, on data held out of "
        "the training data."
    ]
    other = matched_order([row.entry for row in report.rows])
    same = "All methods of a seed had the same batches."
    if other:
        notes.append(f"Not on the batches of the others: {', '.join(other)}.")
    elif any(row.entry.rate is not None and row.parameters for row in report.rows):
        notes.append(same)
    if any(row.entry.edge for row in report.rows):
        notes.append("\\* lowest or highest of the rates that were tried: a better one may lie beyond.")
    versions = {name: report.versions[name] for name in _SHOWN_VERSIONS if name in report.versions}
    shown = ", ".join(f"{name} {' and '.join(numbers)}" for name, numbers in versions.items())
    if report.devices:
        where = f"Device: {'; '.join(report.devices)}. {shown}."
        notes.append(f"{where} {' and '.join(report.dates)}." if report.dates else where)
    return [line for note in notes for line in (note, "")][:-1]


def _trials(entry: Entry) -> str:
    shown = []
    for trial in sorted(entry.trials, key=lambda trial: trial.rate):
        loss = "none" if trial.loss is None else f"{trial.loss:.4f}"
        shown.append(f"{trial.rate:g}: **{loss}**" if trial.rate == entry.rate else f"{trial.rate:g}: {loss}")
    return ", ".join(shown)


#: What a training cost, with the digits to show.
_COSTS = {"seconds": 0, "step_ms": 0, "peak_gib": 2, "base_mib": 1}


def _cost_lines(rows: Sequence[Row]) -> list[str]:
    cells = []
    for row in rows:
        trained = [outcome["trained"] for outcome in row.entry.outcomes.values()]
        known = {cost: [run[cost] for run in trained if run.get(cost)] for cost in _COSTS}
        shown = [f"{median(of):.{_COSTS[cost]}f}" if of else "" for cost, of in known.items()]
        cells.append([row.entry.name, *shown])
    told = (
        "Medians over seeds. Seconds are of a whole training with its evaluation on held-out data. Other "
        "processes may have shared the device: no time here tells a method's speed. The peak is the "
        "GPU memory that the training steps of this process alone took, the base's all of its frozen weights."
    )
    return [*_table(["", "seconds", "ms a step", "peak GiB", "base MiB"], cells), "", told]


def _gate_lines(rows: Sequence[Row]) -> list[str]:
    cells = []
    for row in rows:
        assert row.gates is not None
        for kind, group in groupby(row.gates.final.items(), key=lambda item: item[0].partition(" ")[0]):
            gates = ", ".join(f"{name.partition(' ')[2]}: {_gate(*value)}" for name, value in group)
            spread = row.gates.final_entropy
            entropy = (
                f"{spread['mean']:.3f} ({spread['lowest']:.3f} to {spread['highest']:.3f})" if spread else ""
            )
            cells.append([row.entry.name, entropy, kind, gates])
    heads = ["", "entropy at the end, mean (extremes of layers)", "layers", "r α at the end by shape"]
    told = (
        "The entropy is that of a layer's gates over that of equal ones. r α is 1 where all components weigh "
        "the same; ± is the standard deviation over seeds of the mean over layers."
    )
    return [*_table(heads, cells), "", told]


def _gate(value: float | None, spread: float) -> str:
    return "undefined" if value is None else _spread(value, spread, 3)


def _spread(value: float, spread: float, digits: int) -> str:
    """A mean over seeds with its standard deviation, which a single seed has not."""
    return f"{value:.{digits}f} ± {spread:.{digits}f}" if spread else f"{value:.{digits}f}"


def _rank_lines(rows: Sequence[Row]) -> list[str]:
    kinds = list(dict.fromkeys(kind for row in rows if row.ranks for kind in row.ranks.kinds))
    heads = ["", "stable rank", "entropy rank", "norm", *(f"{kind}: stable, entropy" for kind in kinds)]
    cells = []
    for row in rows:
        assert row.ranks is not None
        means = [_spread(*mean, 2) for mean in (row.ranks.stable, row.ranks.entropy)]
        pairs = [row.ranks.kinds.get(kind) for kind in kinds]
        each = [f"{pair[0]:.1f}, {pair[1]:.1f}" if pair else "" for pair in pairs]
        cells.append([row.entry.name, *means, f"{row.ranks.norm[0]:.3f}", *each])
    told = "Means over layers; ± is the standard deviation over seeds. Of DoRA it is the low-rank part alone."
    return [*_table(heads, cells), "", told]


def _forgotten_lines(rows: Sequence[Row], reference: str | None) -> list[str]:
    several = any(row.forgotten and row.forgotten.over_reference for row in rows)
    heads = ["", "before", "after", "difference", *([f"after − {reference}"] if several else [])]
    cells = []
    for row in rows:
        assert row.forgotten is not None
        text = row.forgotten
        over = [_signed(text.over_reference)] if several else []
        cells.append(
            [row.entry.name, _plain(text.before), _plain(text.after), _signed(text.difference), *over]
        )
    told = (
        "Negative log-likelihood per token, nats, ± standard error over windows and seeds; differences are "
        "paired by window. The more it rises, the more was forgotten."
    )
    return [*_table(heads, cells), "", told]


def _signed(share: Share | None) -> str:
    return "" if share is None else f"{share.value:+.4f} ± {share.stderr or 0:.4f}"


def _pair_lines(pairs: Sequence[Comparison], score: str) -> list[str]:
    answered = any(pair.acc_norm is not None for pair in pairs)
    heads = ["NLL", "95% interval", "p"]
    if answered:
        heads = [score, "95% interval", "p", "items won : lost", "sign test p", *heads]
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
