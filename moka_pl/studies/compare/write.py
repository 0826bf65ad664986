"""A comparison's report on disk: Markdown, JSON and pictures."""

import json
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
                "step_ms": [o["trained"].get("step_ms") for o in row.entry.outcomes.values()],
                "peak_gib": [o["trained"].get("peak_gib") for o in row.entry.outcomes.values()],
                "base_mib": [o["trained"].get("base_mib") for o in row.entry.outcomes.values()],
                "training_loss": row.curve,
                "gates": None if row.gates is None else asdict(row.gates),
                "ranks": None if row.ranks is None else asdict(row.ranks),
                "forgotten": None if row.forgotten is None else asdict(row.forgotten),
                "errors": row.entry.errors,
            }
            for row in report.rows
        ],
        "differences": [asdict(pair) for pair in report.pairs],
    }
