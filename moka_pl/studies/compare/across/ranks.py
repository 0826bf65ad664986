"""Ranks of the trained updates of several suites side by side."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moka_pl.studies.common import write_atomically
from moka_pl.studies.compare.figures import finish, new_figure, style_of
from moka_pl.studies.compare.report import Report
from moka_pl.studies.compare.write import lines_of

#: Suites whose names begin so are set side by side.
PREFIX = "rank-"


def write_ranks(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Writes ``ranks.md``, ``ranks.json`` and ``ranks.png`` of the suites about ranks, if there are several.

    Args:
        reports: The reports, in the order of what their data ask for.
        folder: Where the files go.

    Returns:
        The files.
    """
    chosen = [report for report in reports if report.suite.name.startswith(PREFIX)]
    chosen = [report for report in chosen if any(row.ranks for row in report.rows)]
    if len(chosen) < 2:
        return []
    rows = [
        {"suite": report.suite.name, "method": row.entry.name, "seeds": sorted(row.entry.outcomes)}
        | {"learning_rate": row.entry.rate, "parameters": row.parameters, **asdict(row.ranks)}
        for report in chosen
        for row in report.rows
        if row.ranks is not None
    ]
    for row in rows:
        row.pop("spectra")
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "ranks.md", folder / "ranks.json", folder / "ranks.png"]
    write_atomically(files[0], _markdown(chosen))
    write_atomically(files[1], lines_of({"rows": rows}))
    draw_ranks(chosen, files[2])
    return files


def _markdown(reports: Sequence[Report]) -> str:
    methods = list(dict.fromkeys(row.entry.name for report in reports for row in report.rows if row.ranks))
    lines = ["# Ranks of the trained updates by suite", "", *(_about(report) for report in reports), ""]
    lines += ["Mean over layers and seeds of the stable rank and the entropy rank of ΔW, and its norm.", ""]
    lines += [f"| | {' | '.join(report.suite.name for report in reports)} |"]
    lines += ["|---" * (len(reports) + 1) + "|"]
    for method in methods:
        cells = []
        for report in reports:
            ranks = next((row.ranks for row in report.rows if row.entry.name == method), None)
            means = () if ranks is None else (ranks.stable[0], ranks.entropy[0], ranks.norm[0])
            cells.append(", ".join(f"{mean:.2f}" for mean in means))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _about(report: Report) -> str:
    return f"- {report.suite.name}: {report.suite.about or 'no description'}"


def draw_ranks(reports: Sequence[Report], file: Path) -> None:
    """Stable and entropy rank of every method over the suites."""
    methods = list(dict.fromkeys(row.entry.name for report in reports for row in report.rows if row.ranks))
    figure = new_figure(11, 4.8)
    axes: Any = figure.subplots(1, 2)
    for axis, which in zip(axes, ("stable", "entropy"), strict=True):
        for index, method in enumerate(methods):
            points = [
                (x, *getattr(row.ranks, which))
                for x, report in enumerate(reports)
                for row in report.rows
                if row.entry.name == method and row.ranks is not None
            ]
            xs, means, spreads = zip(*points, strict=True)
            axis.errorbar(xs, means, spreads, marker="o", capsize=3, label=method, **style_of(index))
        axis.set_yscale("log")
        axis.set_xticks(range(len(reports)), [report.suite.name for report in reports], fontsize=8)
        axis.set_title(f"{which} rank of ΔW, mean over layers", fontsize=10)
        axis.grid(alpha=0.3)
    devices = sorted({device for report in reports for device in report.devices})
    finish(figure, axes[0], f"ranks reached, {'; '.join(devices)}", file)
