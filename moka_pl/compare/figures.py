"""Pictures of a comparison: scores over trainable parameters, and loss curves."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.results import Share

if TYPE_CHECKING:
    from moka_pl.compare.report import Report, Row


def write_figures(report: "Report", folder: Path) -> list[Path]:
    """Draws what there is to draw.

    Args:
        report: The comparison.
        folder: Where `scores.png` and `losses.png` go.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if any(row.entry.rate is not None and row.parameters for row in report.rows):
        _draw_scores(report, folder / "scores.png")
        written.append(folder / "scores.png")
    if any(row.curve for row in report.rows):
        _draw_losses(report, folder / "losses.png")
        written.append(folder / "losses.png")
    return written


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no global state, no display.
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_scores(report: "Report", file: Path) -> None:
    panels: list[tuple[str, Callable[[Row], Share | None], float]] = [
        ("acc_norm, mean of the tasks, %", lambda row: row.mean, 100.0),
        ("NLL of the right answer, nats per token", lambda row: row.nll, 1.0),
    ]
    panels = [panel for panel in panels if any(panel[1](row) is not None for row in report.rows)]
    figure = _figure(5.5 * len(panels), 5.2)
    axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, score, factor) in zip(axes, panels, strict=True):
        for index, row in enumerate(report.rows):
            share = score(row)
            if share is None:
                continue
            value, error = factor * share.value, factor * (share.stderr or 0.0)
            if not row.parameters:  # the frozen base: a level to compare with
                axis.axhline(value, color="0.5", linestyle=":", label=row.entry.name)
                continue
            style = {"color": f"C{index % 10}", "marker": "os^Dv"[index // 10 % 5], "capsize": 3}
            axis.errorbar(row.parameters, value, error, linestyle="none", label=row.entry.name, **style)
        axis.set_xscale("log")
        axis.set_xlabel("trainable parameters")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    _legend(figure, axes[0])
    figure.suptitle(_title(report), fontsize=11)
    figure.savefig(file)


def _draw_losses(report: "Report", file: Path) -> None:
    figure = _figure(8, 5)
    axis = figure.subplots()
    for index, row in enumerate(report.rows):
        if row.curve:
            dashes = ["-", "--", ":"][index // 10 % 3]
            label = f"{row.entry.name}, lr {row.entry.rate:g}"
            axis.plot(*zip(*row.curve, strict=True), color=f"C{index % 10}", linestyle=dashes, label=label)
    axis.set_xlabel("optimizer step")
    axis.set_title("training loss, nats per token, mean over seeds", fontsize=10)
    axis.grid(alpha=0.3)
    _legend(figure, axis)
    figure.suptitle(_title(report), fontsize=11)
    figure.savefig(file)


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)


def _title(report: "Report") -> str:
    seeds: Sequence[int] = report.suite.seeds
    count = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    return f"{report.suite.name}, {count}, {'; '.join(report.devices)}"
