"""Pictures of a comparison: scores over trainable parameters, losses, gates, and ranks of the updates."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.evaluation.results import Share

if TYPE_CHECKING:
    from moka_pl.studies.compare.report import Gates, Report, Row


def new_figure(width: float, height: float) -> Any:
    """A figure of some inches."""
    from matplotlib.figure import Figure

    # Without pyplot: no global state, no display.
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def style_of(index: int) -> dict[str, str]:
    """Colour and dashes of the i-th line."""
    return {"color": f"C{index % 10}", "linestyle": ["-", "--", ":", "-."][index // 10 % 4]}


def finish(figure: Any, axis: Any, title: str, file: Path) -> None:
    """Puts the legend of an axis below, and writes the file.

    Args:
        figure: The figure.
        axis: The axis whose lines the legend names.
        title: Title of the figure.
        file: A PNG file.
    """
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=11)
    save_small(figure, file)


def save_small(figure: Any, file: Path) -> None:
    """Writes a PNG of 128 colours, a third of the usual size."""
    from PIL import Image

    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(128).save(file, optimize=True)


def title_of(report: "Report") -> str:
    """Suite, seeds and device."""
    count = len(report.suite.seeds)
    seeds = f"{count} seeds" if count > 1 else "one seed"
    return f"{report.suite.name}, {seeds}, {'; '.join(report.devices)}"


#: Methods whose gates get a panel.
_PANELS = 5


def draw_gates(report: "Report", file: Path) -> None:
    """The entropy of all gated methods, and the gates by shape of the first ones."""
    # Numbered among all rows: a method has the same colour in all figures.
    gated = [(i, row.entry.name, row.gates) for i, row in enumerate(report.rows) if row.gates is not None]
    shown = gated[:_PANELS]
    columns = min(3, 1 + len(shown))
    rows = -(-(1 + len(shown)) // columns)
    figure = new_figure(5 * columns, 3.9 * rows + 0.4)
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for index, name, gates in gated:
        axes[0].plot(gates.steps, _drawable(gates.entropy), label=name, **style_of(index))
    axes[0].ticklabel_format(axis="y", useOffset=False)
    axes[0].set_title("entropy of the gates, mean over layers, 1 if uniform", fontsize=9)
    for axis, (_, name, gates) in zip(axes[1:], shown, strict=False):
        _draw_shapes(axis, gates)
        axis.set_title(f"{name}: r α by shape, mean over layers", fontsize=9)
    for axis in axes[1 + len(shown) :]:
        axis.set_visible(False)
    for axis in axes[: 1 + len(shown)]:
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.grid(alpha=0.3)
    finish(figure, axes[0], title_of(report), file)


def _draw_shapes(axis: "object", gates: "Gates") -> None:
    kinds = list(dict.fromkeys(name.partition(" ")[0] for name in gates.shapes))
    drawn = dict.fromkeys(kinds, 0)
    for name, values in gates.shapes.items():
        kind = name.partition(" ")[0]
        style = {"color": f"C{drawn[kind] % 10}", "linestyle": ["-", "--", ":", "-."][kinds.index(kind) % 4]}
        drawn[kind] += 1
        axis.plot(gates.steps, _drawable(values), label=name, linewidth=1.2, **style)  # type: ignore[attr-defined]
    axis.legend(fontsize=5, ncols=2)  # type: ignore[attr-defined]


def _drawable(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


#: Panels beside each other.
_COLUMNS = 4


def draw_spectra(report: "Report", file: Path) -> None:
    """Singular values of ΔW relative to the largest one, a panel a kind of layer."""
    # Numbered among all rows: a method has the same colour in all figures.
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


def write_figures(report: "Report", folder: Path) -> list[Path]:
    """Draws what there is to draw.

    Args:
        report: The comparison.
        folder: Where ``scores.png``, ``losses.png``, ``gates.png`` and ``spectra.png`` go.

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
        (f"{report.suite.score_name}, mean of the tasks, %", lambda row: row.mean, 100.0),
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
