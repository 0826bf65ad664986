"""Pictures of the gates: entropy over steps, and gates by the shape of the component."""

from pathlib import Path
from typing import TYPE_CHECKING

from moka_pl.studies.compare.drawing import finish, new_figure, style_of, title_of

if TYPE_CHECKING:
    from moka_pl.studies.compare.gates import Gates
    from moka_pl.studies.compare.report import Report

#: Rivals whose gates get a panel.
_PANELS = 5


def draw_gates(report: "Report", file: Path) -> None:
    """The entropy of all gated rivals, and the gates by shape of the first ones."""
    # Numbered among all rows: a rival has the same colour in all figures.
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
    places = dict.fromkeys(kinds, 0)
    for name, values in gates.shapes.items():
        kind = name.partition(" ")[0]
        style = {"color": f"C{places[kind] % 10}", "linestyle": ["-", "--", ":", "-."][kinds.index(kind) % 4]}
        places[kind] += 1
        axis.plot(gates.steps, _drawable(values), label=name, linewidth=1.2, **style)  # type: ignore[attr-defined]
    axis.legend(fontsize=5, ncols=2)  # type: ignore[attr-defined]


def _drawable(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
