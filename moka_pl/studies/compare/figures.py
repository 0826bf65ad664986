"""Pictures of a comparison: scores over trainable parameters, and loss curves."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.evaluation.results import Share
from moka_pl.studies.compare.drawing import finish, new_figure, style_of, title_of
from moka_pl.studies.compare.gate_figures import draw_gates
from moka_pl.studies.compare.rank_figures import draw_spectra

if TYPE_CHECKING:
    from moka_pl.studies.compare.report import Report, Row


def write_figures(report: "Report", folder: Path) -> list[Path]:
    """Draws what there is to draw.

    Args:
        report: The comparison.
        folder: Where `scores.png`, `losses.png`, `gates.png` and `spectra.png` go.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings: list[tuple[str, bool, Callable[[Report, Path], None]]] = [
        (
            "scores.png",
            any(row.entry.rate is not None and row.parameters for row in report.rows),
            draw_scores,
        ),
        ("losses.png", any(row.curve for row in report.rows), draw_losses),
        ("gates.png", any(row.gates is not None for row in report.rows), draw_gates),
        ("spectra.png", any(row.ranks is not None for row in report.rows), draw_spectra),
    ]
    written = []
    for name, wanted, draw in drawings:
        if wanted:
            draw(report, folder / name)
            written.append(folder / name)
    return written


def draw_scores(report: "Report", file: Path) -> None:
    """Accuracy and likelihood over trainable parameters, with standard errors."""
    panels: list[tuple[str, Callable[[Row], Share | None], float]] = [
        ("acc_norm, mean of the tasks, %", lambda row: row.mean, 100.0),
        ("NLL of the right answer, nats per token", lambda row: row.nll, 1.0),
    ]
    panels = [panel for panel in panels if any(panel[1](row) is not None for row in report.rows)]
    figure = new_figure(5.5 * len(panels), 5.2)
    axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, score, factor) in zip(axes, panels, strict=True):
        base = None
        for index, row in enumerate(report.rows):
            share = score(row)
            if share is None:
                continue
            value, error = factor * share.value, factor * (share.stderr or 0.0)
            if not row.parameters:
                base = value
                continue
            style = {"color": f"C{index % 10}", "marker": "os^Dv"[index // 10 % 5], "capsize": 3}
            axis.errorbar(row.parameters, value, error, linestyle="none", label=row.entry.name, **style)
        if base is not None:
            title = f"{title} (frozen base: {base:.4g})"  # as a line it would press the others together
        axis.set_xscale("log")
        axis.set_xlabel("trainable parameters")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    finish(figure, axes[0], title_of(report), file)


def draw_losses(report: "Report", file: Path) -> None:
    """Training losses over steps."""
    figure = new_figure(8, 5)
    axis = figure.subplots()
    for index, row in enumerate(report.rows):
        if row.curve:
            label = f"{row.entry.name}, lr {row.entry.rate:g}"
            axis.plot(*zip(*row.curve, strict=True), label=label, **style_of(index))
    axis.set_xlabel("optimizer step")
    axis.set_title("training loss, nats per token, mean over seeds", fontsize=10)
    axis.grid(alpha=0.3)
    finish(figure, axis, title_of(report), file)
