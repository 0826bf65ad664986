"""A comparison's report on disk: Markdown, JSON and pictures."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moka_pl.studies.common import write_atomically
from moka_pl.studies.compare.figures import write_figures
from moka_pl.studies.compare.report import Report
from moka_pl.studies.compare.suite import Suite
from moka_pl.studies.compare.tables import markdown
from moka_pl.studies.outputs import check_file, has_keys, json_output, png_output, text_output

#: What several suites tell together, in the folder above theirs.
_ACROSS: dict[str, Callable[[str], Path]] = {
    "families.md": text_output("# Families of tasks\n"),
    "families.json": json_output(has_keys("scores")),
    "families.png": png_output,
    "ranks.md": text_output("# Ranks of the trained updates"),
    "ranks.json": json_output(has_keys("rows")),
    "ranks.png": png_output,
}
_FIGURES = "losses", "gates", "scores", "spectra"


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


def check_reports(suites: Sequence[Suite], folder: Path, option: str) -> None:
    """Refuses a folder with files in the place of reports that are none, before any work.

    Args:
        suites: The suites to report.
        folder: Where their reports go.
        option: The option that names it.

    Raises:
        ConfigError: Naming the first of these files.
    """
    known = [(folder / name, kind) for name, kind in _ACROSS.items()]
    for suite in suites:
        known += [
            (folder / suite.name / "report.md", text_output(f"# {suite.name}\n")),
            (folder / suite.name / "report.json", json_output(has_keys("suite", "rows", "differences"))),
            (folder / suite.name / "transfer.md", text_output("# Which scaling")),
            *((folder / suite.name / f"{name}.png", png_output) for name in _FIGURES),
        ]
    for file, kind in known:
        check_file(option, file, kind)


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
