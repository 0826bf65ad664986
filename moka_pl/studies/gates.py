"""Draws a run's gates over its steps, as TensorBoard has them; ``scripts/plot_gates.py`` runs it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moka_pl.inspection.history import read_gate_curves
from moka_pl.studies.common import Parser, one_line_errors
from moka_pl.studies.outputs import REPLACED_PICTURE, picture_output, save_figure

DESCRIPTION = """\
Draws the gate curves of a run from its TensorBoard events.

    python scripts/plot_gates.py lightning_logs/smollm2/version_0 --out gates.png

One panel per layer, one curve per component. Without --layers, shows the six layers whose final gates are
farthest from uniform.
"""

#: Step and value of every gate of a layer, by component.
Curves = dict[str, list[tuple[int, float]]]


@one_line_errors("plot_gates")
def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the picture.

    Args:
        arguments: Default: the process's.
    """
    parser = Parser("plot_gates", DESCRIPTION)
    parser.add_argument("run", type=Path, help="log folder of a run")
    parser.add_argument(
        "--out", type=picture_output, default="gates.png", help=f"picture to write; {REPLACED_PICTURE}"
    )
    parser.add_argument("--layers", nargs="*", default=[], help="layers to show, such as layer03.q_proj")
    args = parser.parse_args(arguments)
    gates = read_gates(args.run) if args.run.is_dir() else {}
    if not gates:
        parser.error(f"{args.run} has no gate curves; give the log folder of a run with gates")
    chosen = args.layers or sorted(gates, key=lambda layer: -spread(gates[layer]))[:6]
    unknown = [layer for layer in chosen if layer not in gates]
    if unknown:
        parser.error(f"unknown layers {', '.join(unknown)}; choose some of {', '.join(gates)}")
    draw({layer: gates[layer] for layer in chosen}, args.out)
    print(f"{args.out}: {', '.join(chosen)}")


def read_gates(run: Path) -> dict[str, Curves]:
    """The curves of all gates that a run logged, by layer."""
    curves = read_gate_curves(run)
    if curves is None:
        return {}
    return {
        layer: {f"alpha_{i}": curve for i, curve in enumerate(of)} for layer, of in curves.by_layer().items()
    }


def spread(curves: Curves) -> float:
    """How far apart a layer's gates ended."""
    last = [curve[-1][1] for curve in curves.values()]
    return max(last) - min(last)


def draw(gates: dict[str, Curves], file: Path) -> None:
    """Draws a panel a layer."""
    from matplotlib.figure import Figure

    rows = (len(gates) + 2) // 3
    figure = Figure(figsize=(11, 2.9 * rows + 0.5), dpi=100, layout="constrained")
    axes: Any = figure.subplots(rows, min(3, len(gates)), sharex=True, squeeze=False).flatten()
    for axis, (layer, curves) in zip(axes, gates.items(), strict=False):
        for component, curve in curves.items():
            axis.plot(*zip(*curve, strict=True), label=component.replace("alpha_", "α "), linewidth=1.3)
        axis.axhline(1 / len(curves), color="grey", linewidth=0.6, linestyle=":")
        axis.set_title(layer, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("optimizer step", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=10, fontsize=7)
    save_figure(figure, file)
