"""Pictures of the trained updates' ranks: spectra of a suite, and ranks over suites."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.studies.compare.drawing import finish, new_figure, style_of, title_of

if TYPE_CHECKING:
    from moka_pl.studies.compare.report import Report

#: Panels beside each other.
_COLUMNS = 4


def draw_spectra(report: "Report", file: Path) -> None:
    """Singular values of ΔW relative to the largest one, a panel a kind of layer."""
    # Numbered among all rows: a rival has the same colour in all figures.
    ranked = [(i, row.entry.name, row.ranks) for i, row in enumerate(report.rows) if row.ranks is not None]
    kinds = list(dict.fromkeys(kind for _, _, ranks in ranked for kind in ranks.spectra)) or [""]
    columns = min(len(kinds), _COLUMNS)
    rows = -(-len(kinds) // columns)
    figure = new_figure(5.5 * columns, 4.2 * rows + 0.6)
    axes: Any = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(kinds) :]:
        axis.set_visible(False)
    for axis, kind in zip(axes, kinds, strict=False):
        for index, name, ranks in ranked:
            spectrum = ranks.spectra.get(kind)
            if spectrum:
                sizes = [max(size, 1e-6) for size in spectrum["size"]]
                axis.plot(spectrum["index"], sizes, label=name, linewidth=1.3, **style_of(index))
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(1e-4, 1.5)
        axis.set_xlabel("i")
        axis.set_title(f"{kind}: σ_i / σ_1 of ΔW, mean over layers and seeds", fontsize=9)
        axis.grid(alpha=0.3)
    finish(figure, axes[0], title_of(report), file)


def draw_ranks(reports: Sequence["Report"], file: Path) -> None:
    """Stable and entropy rank of every rival over the suites."""
    rivals = list(dict.fromkeys(row.entry.name for report in reports for row in report.rows if row.ranks))
    figure = new_figure(11, 4.8)
    axes: Any = figure.subplots(1, 2)
    for axis, which in zip(axes, ("stable", "entropy"), strict=True):
        for index, rival in enumerate(rivals):
            points = [
                (place, *getattr(row.ranks, which))
                for place, report in enumerate(reports)
                for row in report.rows
                if row.entry.name == rival and row.ranks is not None
            ]
            places, means, spreads = zip(*points, strict=True)
            axis.errorbar(places, means, spreads, marker="o", capsize=3, label=rival, **style_of(index))
        axis.set_yscale("log")
        axis.set_xticks(range(len(reports)), [report.suite.name for report in reports], fontsize=8)
        axis.set_title(f"{which} rank of ΔW, mean over layers", fontsize=10)
        axis.grid(alpha=0.3)
    devices = sorted({device for report in reports for device in report.devices})
    finish(figure, axes[0], f"ranks reached, {'; '.join(devices)}", file)
