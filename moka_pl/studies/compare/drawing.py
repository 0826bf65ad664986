"""What all figures of a comparison have in common."""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moka_pl.studies.compare.report import Report


def new_figure(width: float, height: float) -> Any:
    """A figure of some inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no global state, no display.
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style_of(index: int) -> dict[str, str]:
    """Colour and dashes of the i-th line."""
    return {"color": f"C{index % 10}", "linestyle": ["-", "--", ":", "-."][index // 10 % 4]}


def finish(figure: Any, axis: Any, title: str, file: Path) -> None:
    """Puts the legend of an axis below, and writes the file."""
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
