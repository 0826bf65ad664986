"""The same methods on several families of tasks: one picture, and the differences side by side."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moka_pl.studies.compare.figures import new_figure, save_small
from moka_pl.studies.compare.report import Report, Row
from moka_pl.studies.compare.statistics import Comparison, Difference
from moka_pl.studies.compare.tables import told_name

#: The size in a method's name: rank r8, or x4 components. Methods that differ in it alone are a series.
_SIZE = re.compile(r" (r\d+|x\d+)(?=$|,)")
#: So far apart are methods of a panel with the same number of parameters, as a factor.
_DODGE = 1.035
#: What sets a series of its own apart by its markers alone.
_OTHER_BASE = ", unquantised base"

_NOTE = (
    "± standard error over items and seeds. Differences are those of the reference minus the method, on the "
    "same items, with 95% intervals of a paired bootstrap over items and seeds: above 0 in accuracy and "
    "below 0 in NLL the reference is better; bold where the interval leaves out 0. The rank is that of the "
    "LoRA that the largest update is exactly. Plain text: how much its loss rises, in nats per token, ± "
    "standard error over windows and seeds. \\* the best rate is the lowest or highest tried."
)


def series_of(name: str) -> str:
    """A method's name without its size."""
    return _SIZE.sub("", name)


def size_of(name: str) -> str:
    """The size in a method's name; empty without one."""
    found = _SIZE.search(name)
    return found[1] if found else ""


def shown_rows(report: Report) -> list[Row]:
    """The rows of a family that have a result and were trained."""
    return [row for row in report.rows if row.parameters and row.nll is not None]


def markdown(reports: Sequence[Report]) -> str:
    """A table a family: what every method scores, and what the reference gains over it.

    Args:
        reports: One a family.
    """
    lines = ["# Families of tasks", "", _NOTE]
    for report in reports:
        lines += ["", f"## {report.suite.family}", "", f"{report.suite.name}: {report.suite.about}", ""]
        lines += _table(report)
    return "\n".join(lines) + "\n"


def as_json(reports: Sequence[Report]) -> dict[str, Any]:
    """The numbers of the picture and the table, as JSON values."""
    return {
        "scores": [
            {"family": report.suite.family, "suite": report.suite.name, "method": row.entry.name}
            | {"seeds": sorted(row.entry.outcomes)}
            | {"parameters": row.parameters, "lora_rank": lora_rank(row)}
            | {"mean": None if row.mean is None else asdict(row.mean), "nll": asdict(row.nll)}
            | {"forgotten": None if row.forgotten is None else asdict(row.forgotten)}
            for report in reports
            for row in shown_rows(report)
            if row.nll is not None
        ],
        "differences": [
            {"family": report.suite.family, "minus": pair.one}
            | {name: None if one is None else asdict(one) for name, one in _gains(pair).items()}
            for report in reports
            for pair in _pairs(report)
        ],
    }


def lora_rank(row: Row) -> int | None:
    """Rank of the LoRA that the largest update is exactly; None where it is not known."""
    ranks = [outcome["trained"].get("lora_rank") for outcome in row.entry.outcomes.values()]
    return next((rank for rank in ranks if rank is not None), None)


def _table(report: Report) -> list[str]:
    minus = f"{report.suite.reference} minus it" if report.suite.reference else "difference"
    heads = ["", "trainable", "LoRA rank", "accuracy, %", minus, "NLL", minus]
    forgetting = any(row.forgotten for row in shown_rows(report))
    heads += ["plain text"] if forgetting else []
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    gains = {pair.one: _gains(pair) for pair in _pairs(report)}
    for row in shown_rows(report):
        assert row.nll is not None
        rank, gain = lora_rank(row), gains.get(row.entry.name, {})
        name = told_name(row.entry, len(report.suite.seeds)) + (" \\*" if row.entry.edge else "")
        cells = [name, f"{row.parameters:,}", str(rank or "")]
        cells += [
            "" if row.mean is None else f"{100 * row.mean.value:.1f} ± {100 * (row.mean.stderr or 0):.1f}"
        ]
        cells += [_interval(gain.get("accuracy"), 100, 2)]
        cells += [f"{row.nll.value:.3f} ± {row.nll.stderr or 0:.3f}", _interval(gain.get("nll"), 1, 4)]
        if forgetting:
            cells.append(_plain_text(row))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _plain_text(row: Row) -> str:
    if row.forgotten is None:
        return ""
    change = row.forgotten.difference
    return f"{change.value:+.3f} ± {change.stderr or 0:.3f}"


def _pairs(report: Report) -> list[Comparison]:
    return [pair for pair in report.pairs if pair.other == report.suite.reference]


def _gains(pair: Comparison) -> dict[str, Difference | None]:
    return {"accuracy": _reversed(pair.acc_norm), "nll": _reversed(pair.nll)}


def _reversed(of: Difference | None) -> Difference | None:
    return None if of is None else Difference(0.0 - of.value, 0.0 - of.high, 0.0 - of.low, of.p)  # no -0


def _interval(of: Difference | None, factor: float, digits: int) -> str:
    if of is None:
        return ""
    value, low, high = (f"{factor * number:+.{digits}f}" for number in (of.value, of.low, of.high))
    value = f"**{value}**" if of.low > 0 or of.high < 0 else value
    return f"{value} ({low} to {high})"


def draw(reports: Sequence[Report], file: Path) -> None:
    """Accuracy and likelihood over trainable parameters, a row of panels a family.

    Args:
        reports: One a family.
        file: A PNG file.
    """
    names = list(dict.fromkeys(series_of(row.entry.name) for report in reports for row in shown_rows(report)))
    colours = list(dict.fromkeys(name.removesuffix(_OTHER_BASE) for name in names))
    styles = {name: _style(name, colours.index(name.removesuffix(_OTHER_BASE))) for name in names}
    accurate = any(row.mean is not None for report in reports for row in shown_rows(report))
    figure = new_figure(11 if accurate else 6.5, 4.6 * len(reports) + 0.5 + 0.22 * -(-len(names) // 3))
    axes: Any = figure.subplots(len(reports), 1 + accurate, squeeze=False)
    for panels, report in zip(axes, reports, strict=True):
        if accurate:
            _panel(panels[0], report, styles, "mean", 100.0, "accuracy, %")
        _panel(panels[-1], report, styles, "nll", 1.0, "NLL, nats per token (lower is better)")
    legend: dict[str, Any] = {}
    for axis in axes.flatten():
        legend |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    handles = [legend[name] for name in names if name in legend]
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=9)
    devices = sorted({device for report in reports for device in report.devices})
    figure.suptitle(f"Methods over trainable parameters, ± standard error, {'; '.join(devices)}", fontsize=11)
    save_small(figure, file)


def _style(name: str, index: int) -> dict[str, Any]:
    style = {"color": f"C{index % 10}", "marker": "osD^vP"[index // 10 % 6], "markersize": 6, "capsize": 2}
    return style | ({"markerfacecolor": "white", "linestyle": ":"} if name.endswith(_OTHER_BASE) else {})


def _panel(
    axis: Any, report: Report, styles: dict[str, dict[str, Any]], score: str, factor: float, title: str
) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [row for row in shown_rows(report) if getattr(row, score) is not None]
    if not rows:
        axis.set_visible(False)
        return
    # As a line it would press the others together.
    frozen = [getattr(row, score) for row in report.rows if row.parameters == 0]
    before = "".join(f" (frozen base: {factor * share.value:.3g})" for share in frozen if share is not None)
    axis.set_title(f"{report.suite.family}\n{title}{before}", fontsize=10)
    places = _places(rows)
    for name, style in styles.items():
        of_series = sorted(
            (row for row in rows if series_of(row.entry.name) == name), key=lambda r: r.parameters or 0
        )
        if not of_series:
            continue
        shares = [getattr(row, score) for row in of_series]
        xs = [places[row.entry.name] for row in of_series]
        ys, errors = [factor * s.value for s in shares], [factor * (s.stderr or 0.0) for s in shares]
        axis.errorbar(xs, ys, errors, label=name, linewidth=1.8, elinewidth=0.6, **style)
        for row, x, y in zip(of_series, xs, ys, strict=True):
            where = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 8, "color": style["color"]}
            axis.annotate(size_of(row.entry.name), (x, y), **where)
    axis.set_xscale("log")
    axis.margins(x=0.08)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(
        lambda number, _: f"{number / 1e6:g} M" if number >= 1e6 else f"{number / 1e3:g} k"
    )
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("trainable parameters", fontsize=9)
    axis.grid(alpha=0.3)


def _places(rows: Sequence[Row]) -> dict[str, float]:
    """Where each method is on the axis: beside each other where they have about the same parameters."""
    places: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: row.parameters or 0):
        x = float(row.parameters or 0)
        while any(max(x, other) / min(x, other) < _DODGE for other in places.values()):
            x *= _DODGE
        places[row.entry.name] = x
    return places
