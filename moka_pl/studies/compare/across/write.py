"""The files of what several suites, or many methods of one, tell together."""

from collections.abc import Sequence
from pathlib import Path

from moka_pl.studies.common import write_atomically
from moka_pl.studies.compare.across import families, transfer
from moka_pl.studies.compare.across.ranks import write_ranks
from moka_pl.studies.compare.report import Report
from moka_pl.studies.compare.write import lines_of


def write_across(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Writes whatever the reports have together.

    ``ranks.*`` of the suites about ranks; ``families.*`` of those with a ``family``; and ``transfer.md`` in
    the folder of every suite that tries several scalings of servable updates.

    Args:
        reports: The reports.
        folder: Where the files go.

    Returns:
        The files.
    """
    return [
        *write_ranks(reports, folder),
        *_write_families(reports, folder),
        *_write_transfer(reports, folder),
    ]


def _write_families(reports: Sequence[Report], folder: Path) -> list[Path]:
    chosen = [report for report in reports if report.suite.family and families.shown_rows(report)]
    if not chosen:
        return []
    files = [folder / f"families.{ending}" for ending in ("md", "json", "png")]
    write_atomically(files[0], families.markdown(chosen))
    write_atomically(files[1], lines_of(families.as_json(chosen)))
    families.draw(chosen, files[2])
    return files


def _write_transfer(reports: Sequence[Report], folder: Path) -> list[Path]:
    files = []
    for report in reports:
        if (found := transfer.transfer(report)) is not None:
            files.append(folder / report.suite.name / "transfer.md")
            write_atomically(files[-1], transfer.markdown(found))
    return files
