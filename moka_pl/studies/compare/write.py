"""A comparison's report on disk: Markdown, JSON and pictures; and ranks of several suites side by side."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moka_pl.studies.common import write_atomically
from moka_pl.studies.compare.figures import write_figures
from moka_pl.studies.compare.report import Report
from moka_pl.studies.compare.tables import markdown


def write_report(report: Report, folder: Path) -> list[Path]:
    """Writes ``report.md``, ``report.json`` and the figures.

    Args:
        report: What to write.
        folder: Where to.

    Returns:
        The files.
    """
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


#: Suites whose names begin so are set side by side.
PREFIX = "rank-"


def write_across(reports: Sequence[Report], folder: Path) -> list[Path]:
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
    from moka_pl.studies.compare.figures import draw_ranks

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
