"""Do gates find structure? Students of synthetic teachers, over many seeds, and figures of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moka_pl.adapters.filter_search.search import choose_shapes
from moka_pl.adapters.filters import filter_shapes
from moka_pl.studies.outputs import save_figure
from moka_pl.studies.teachers.model import (
    HARDER,
    OFFERED,
    SIDE,
    TEACHERS,
    Runs,
    Students,
    correlation,
    first_gradients,
    found_parts,
    of_right_shapes,
    teacher,
    train,
)

ResultRow = dict[str, Any]
#: MoKA's own start, and left factors along the first gradient.
STARTS = ("random", "gradient")
#: Students whose errors are compared, all of about as many parameters, and which with which.
KINDS = ("diverse", "diverse, gradient start", "auto", "auto, gradient start")
PAIRS = (
    ("auto", "diverse"),
    ("diverse, gradient start", "diverse"),
    ("auto, gradient start", "auto"),
    ("auto, gradient start", "diverse"),
)


@dataclass(frozen=True)
class TeacherStudy:
    """What is trained.

    Attributes:
        rates: Learning rates.
        seeds: Seeds of teacher and student.
        steps: Optimizer steps.
        tokens: Random inputs a step.
        first_tokens: Random inputs of the first gradient.
        components: Components of the chosen and diverse students.
        trained: Seeds whose chosen and diverse students are trained.
    """

    rates: tuple[float, ...]
    seeds: int = 20
    steps: int = 400
    tokens: int = 64
    first_tokens: int = 512
    components: int = 10
    trained: int = 20


def run_offered(name: str, start: str, study: TeacherStudy) -> tuple[list[ResultRow], Runs]:
    """Trains students with all shapes on offer, all seeds at all learning rates on one teacher.

    Args:
        name: One of ``TEACHERS``.
        start: One of ``STARTS``.
        study: What is trained.

    Returns:
        A row a rate: how often the largest gates and energies are those of the right components, their
        shares, and the error that is left; and the runs, rate by rate.
    """
    right = TEACHERS[name]
    seeds = [seed for _ in study.rates for seed in range(study.seeds)]
    rates = [rate for rate in study.rates for _ in range(study.seeds)]
    targets = torch.stack([teacher([OFFERED[i] for i in right], SIDE, seed) for seed in seeds])
    students = Students(OFFERED, SIDE, seeds)
    if start == "gradient":
        students.start_along(first_gradients(targets, seeds, study.first_tokens))
    runs = train(students, targets, rates, study.steps, study.tokens)
    gates = runs.gates[-1]  # (S, r)
    fitting = of_right_shapes(right, OFFERED)
    shares = runs.energy / runs.energy.sum(1, keepdim=True)
    rows = []
    for i, rate in enumerate(study.rates):
        of_rate = slice(i * study.seeds, (i + 1) * study.seeds)
        rows.append(
            {
                "teacher": name,
                "start": start,
                "lr": rate,
                "found_by_gates": int(found_parts(gates[of_rate], right).sum()),
                "found_by_energy": int(found_parts(runs.energy[of_rate], right).sum()),
                "seeds": study.seeds,
                "gates_on_right": float(gates[of_rate][:, fitting].sum(1).mean()),
                "uniform": len(fitting) / len(OFFERED),
                "energy_on_right": float(shares[of_rate][:, fitting].sum(1).mean()),
                "error": float(runs.error[of_rate].mean()),
                "error_std": float(runs.error[of_rate].std()),
            }
        )
    return rows, runs


def run_chosen(name: str, correlated: bool, study: TeacherStudy) -> ResultRow:
    """Chooses shapes from each seed's first gradient, and trains students of them beside diverse ones.

    Args:
        name: One of ``TEACHERS`` or ``HARDER``.
        correlated: Whether inputs are correlated rather than white.
        study: What is trained.

    Returns:
        What was chosen, and for each of ``KINDS`` the geometric mean over the seeds of the relative error at
        its best rate; for each of ``PAIRS`` in how many seeds the one beats the other.
    """
    parts = HARDER[name] if name in HARDER else tuple(OFFERED[i] for i in TEACHERS[name])
    mixing = correlation(SIDE) if correlated else None
    r = study.components
    diverse = filter_shapes("diverse", r, SIDE, SIDE)
    budget = sum(shape.num_parameters for shape in diverse)
    seeds = range(study.seeds)
    targets = torch.stack([teacher(parts, SIDE, seed) for seed in seeds])
    gradients = first_gradients(targets, seeds, study.first_tokens, mixing)
    chosen = [tuple(choose_shapes(gradient, r, budget)) for gradient in gradients]
    errors = {}
    for kind in KINDS:
        shapes = [chosen[seed] if kind.startswith("auto") else diverse for seed in seeds]
        errors[kind] = [[0.0] * len(study.rates) for _ in range(study.trained)]
        for same in dict.fromkeys(shapes[: study.trained]):  # runs of the same shapes are trained at once
            alike = [seed for seed in range(study.trained) if shapes[seed] == same]
            many = [seed for seed in alike for _ in study.rates]
            students = Students(same, SIDE, many)
            if kind.endswith("gradient start"):
                students.start_along(gradients[many])
            rates = [*study.rates] * len(alike)
            error = train(students, targets[many], rates, study.steps, study.tokens, mixing=mixing).error
            for seed, row in zip(alike, error.view(len(alike), -1).tolist(), strict=True):
                errors[kind][seed] = row
    best = {kind: _best_rate(rows) for kind, rows in errors.items()}
    return {
        "teacher": name,
        "inputs": "correlated" if correlated else "white",
        "first_is_right": sum(shapes[0] in parts for shapes in chosen),
        "all_are_chosen": sum(set(parts) <= set(shapes) for shapes in chosen) if parts else 0,
        "outer_products": sum(min(s[:2]) == 1 == min(s[2:4]) for shapes in chosen for s in shapes)
        / (r * study.seeds),
        "seeds": study.seeds,
        "example": [str(shape) for shape in chosen[0]],
        "budget": budget,
        "parameters": sum(s.num_parameters for shapes in chosen for s in shapes) / len(chosen),
        "trained": study.trained,
        "options": list(study.rates),
        "best_rate": {kind: study.rates[at] for kind, at in best.items()},
        "error": {kind: _geometric_mean(errors[kind], at) for kind, at in best.items()},
        "wins": {
            f"{one} over {other}": sum(
                a[best[one]] < b[best[other]] for a, b in zip(errors[one], errors[other], strict=True)
            )
            for one, other in PAIRS
        },
        "errors": errors,
    }


def _best_rate(errors: list[list[float]]) -> int:
    """Number of the rate with the smallest geometric mean of the seeds' errors."""
    return min(range(len(errors[0])), key=lambda at: _geometric_mean(errors, at))


def _geometric_mean(errors: list[list[float]], rate: int) -> float:
    """Geometric mean over the seeds: errors differ by orders of magnitude."""
    return math.exp(sum(math.log(max(row[rate], 1e-30)) for row in errors) / len(errors))


#: Of a teacher and a start: the steps, and all gates at them, (T, S, r).
Curves = Mapping[tuple[str, str], tuple[Sequence[int], Tensor]]


def draw_gates(curves: Curves, rate: float, file: Path) -> None:
    """Draws the mean gates of all components over the steps, a panel a teacher and start.

    Args:
        curves: The gates.
        rate: The learning rate that they are of.
        file: A picture; its folder is made if need be.
    """
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
    save_figure(figure, file)


def draw_choices(choices: Sequence[ResultRow], file: Path) -> None:
    """Draws every seed's error at the best rate, a panel a teacher."""
    from matplotlib.figure import Figure

    columns = 3
    figure = Figure(figsize=(12, 2.4 * math.ceil(len(choices) / columns)), dpi=90, layout="constrained")
    axes = figure.subplots(math.ceil(len(choices) / columns), columns, squeeze=False)
    for axis in axes.flat[len(choices) :]:
        axis.set_axis_off()
    for axis, choice in zip(axes.flat, choices, strict=False):
        for i, kind in enumerate(KINDS):
            at = choice["options"].index(choice["best_rate"][kind])
            values = [row[at] for row in choice["errors"][kind]]
            spread = [i + 0.3 * (n / len(values) - 0.5) for n in range(len(values))]
            axis.plot(spread, values, "o", markersize=3, color=f"C{i}")
            axis.hlines(choice["error"][kind], i - 0.3, i + 0.3, color="black", linewidth=1)
        axis.set_yscale("log")
        axis.set_xticks(range(len(KINDS)), [kind.replace(", ", ",\n") for kind in KINDS], fontsize=6)
        axis.set_title(f"{choice['teacher']}, {choice['inputs']} inputs", fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_ylabel("relative error", fontsize=7)
    save_figure(figure, file)
