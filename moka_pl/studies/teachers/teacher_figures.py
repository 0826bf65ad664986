"""Figures of the study of teachers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from moka_pl.studies.teachers.model import OFFERED, TEACHERS
from moka_pl.studies.teachers.study import KINDS, STARTS, Found

#: Of a teacher and a start: the steps, and all gates at them, (T, S, r).
Curves = Mapping[tuple[str, str], tuple[Sequence[int], Tensor]]


def draw_gates(curves: Curves, rate: float, file: Path) -> None:
    """Draws the mean gates of all components over the steps, a panel a teacher and start."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), dpi=90)
    axes = figure.subplots(len(STARTS), len(TEACHERS), sharex=True, sharey=True)
    for (name, start), (steps, gates) in curves.items():
        axis = axes[STARTS.index(start)][list(TEACHERS).index(name)]
        for i, shape in enumerate(OFFERED):
            right = i in TEACHERS[name]
            axis.plot(
                steps,
                gates[:, :, i].mean(1),
                color=f"C{i}",
                linewidth=2.4 if right else 1.0,
                linestyle="-" if right else ":",
                label=str(shape),
            )
        axis.axhline(1 / len(OFFERED), color="grey", linewidth=0.5)
        axis.set_title(f"{name}\n{start} start", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes[-1]:
        axis.set_xlabel(f"step (learning rate {rate:g})", fontsize=8)
    for row in axes:
        row[0].set_ylabel("gate α, mean over seeds", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=7)
    figure.set_layout_engine("constrained")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def draw_choices(choices: Sequence[Found], file: Path) -> None:
    """Draws every seed's error at the best rate, a panel a teacher."""
    from matplotlib.figure import Figure

    columns = 3
    figure = Figure(figsize=(12, 2.4 * math.ceil(len(choices) / columns)), dpi=90, layout="constrained")
    axes = figure.subplots(math.ceil(len(choices) / columns), columns, squeeze=False)
    for axis in axes.flat[len(choices) :]:
        axis.set_axis_off()
    for axis, found in zip(axes.flat, choices, strict=False):
        for i, kind in enumerate(KINDS):
            at = found["options"].index(found["best_rate"][kind])
            values = [row[at] for row in found["errors"][kind]]
            spread = [i + 0.3 * (n / len(values) - 0.5) for n in range(len(values))]
            axis.plot(spread, values, "o", markersize=3, color=f"C{i}")
            axis.hlines(found["error"][kind], i - 0.3, i + 0.3, color="black", linewidth=1)
        axis.set_yscale("log")
        axis.set_xticks(range(len(KINDS)), [kind.replace(", ", ",\n") for kind in KINDS], fontsize=6)
        axis.set_title(f"{found['teacher']}, {found['inputs']} inputs", fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_ylabel("relative error", fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
