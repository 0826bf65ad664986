#!/usr/bin/env python3
"""Do gates find structure? Trains one layer towards updates of known structure, over many seeds.

    python scripts/teachers.py --json teachers.json --figure teachers.png

Prints Markdown. For every teacher, start and learning rate: how often the components with the largest gates
(or with the largest part ‖α A ⊗ B‖² of the update) are exactly the right ones, the share of gates and of
energy on those, and the error that is left. `random` is MoKA's start, `gradient` starts the left factors
along the first gradient. Then, what would be chosen from that gradient without training, and what students
of those shapes reach beside the diverse ones of as many parameters, from either start, also with correlated
inputs and for teachers that few products cannot hold.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch

from moka_pl.analysis.choice import choose_shapes
from moka_pl.analysis.teachers import (
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
from moka_pl.filters import filter_shapes

STARTS = ("random", "gradient")
KINDS = ("diverse", "diverse, gradient start", "auto", "auto, gradient start")
PAIRS = (
    ("auto", "diverse"),
    ("diverse, gradient start", "diverse"),
    ("auto, gradient start", "auto"),
    ("auto, gradient start", "diverse"),
)


def run_offered(name: str, start: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], Runs]:
    """Trains all seeds at all learning rates on one teacher; returns a row a rate, and the runs."""
    right = TEACHERS[name]
    seeds = [seed for _ in args.rates for seed in range(args.seeds)]
    rates = [rate for rate in args.rates for _ in range(args.seeds)]
    targets = torch.stack([teacher([OFFERED[i] for i in right], SIDE, seed) for seed in seeds])
    students = Students(OFFERED, SIDE, seeds)
    if start == "gradient":
        students.start_along(first_gradients(targets, seeds, args.first_tokens))
    runs = train(students, targets, rates, args.steps, args.tokens)
    gates = runs.gates[-1]  # (S, r)
    fitting = of_right_shapes(right, OFFERED)
    shares = runs.energy / runs.energy.sum(1, keepdim=True)
    rows = []
    for i, rate in enumerate(args.rates):
        own = slice(i * args.seeds, (i + 1) * args.seeds)
        rows.append(
            {
                "teacher": name,
                "start": start,
                "lr": rate,
                "found_by_gates": int(found_parts(gates[own], right).sum()),
                "found_by_energy": int(found_parts(runs.energy[own], right).sum()),
                "seeds": args.seeds,
                "gates_on_right": float(gates[own][:, fitting].sum(1).mean()),
                "uniform": len(fitting) / len(OFFERED),
                "energy_on_right": float(shares[own][:, fitting].sum(1).mean()),
                "error": float(runs.error[own].mean()),
                "error_std": float(runs.error[own].std()),
            }
        )
    return rows, runs


def choose(name: str, correlated: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Chooses shapes from each seed's first gradient, and trains students of them beside diverse ones."""
    parts = HARDER[name] if name in HARDER else tuple(OFFERED[i] for i in TEACHERS[name])
    mixing = correlation(SIDE) if correlated else None
    r = args.components
    diverse = filter_shapes("diverse", r, SIDE, SIDE)
    budget = sum(shape.num_parameters for shape in diverse)
    seeds = range(args.seeds)
    targets = torch.stack([teacher(parts, SIDE, seed) for seed in seeds])
    gradients = first_gradients(targets, seeds, args.first_tokens, mixing)
    chosen = [tuple(choose_shapes(gradient, r, budget)) for gradient in gradients]
    errors = {}
    for kind in KINDS:
        shapes = [chosen[seed] if kind.startswith("auto") else diverse for seed in seeds]
        errors[kind] = [[0.0] * len(args.rates) for _ in range(args.trained)]
        for same in dict.fromkeys(shapes[: args.trained]):  # runs of the same shapes are trained at once
            own = [seed for seed in range(args.trained) if shapes[seed] == same]
            many = [seed for seed in own for _ in args.rates]
            students = Students(same, SIDE, many)
            if kind.endswith("gradient start"):
                students.start_along(gradients[many])
            rates = args.rates * len(own)
            found = train(students, targets[many], rates, args.steps, args.tokens, mixing=mixing).error
            for seed, row in zip(own, found.view(len(own), -1).tolist(), strict=True):
                errors[kind][seed] = row
    best = {kind: best_rate(found) for kind, found in errors.items()}
    return {
        "teacher": name,
        "inputs": "correlated" if correlated else "white",
        "first_is_right": sum(shapes[0] in parts for shapes in chosen),
        "all_are_chosen": sum(set(parts) <= set(shapes) for shapes in chosen) if parts else 0,
        "outer_products": sum(min(s[:2]) == 1 == min(s[2:4]) for shapes in chosen for s in shapes)
        / (r * args.seeds),
        "seeds": args.seeds,
        "example": [str(shape) for shape in chosen[0]],
        "budget": budget,
        "parameters": sum(s.num_parameters for shapes in chosen for s in shapes) / len(chosen),
        "trained": args.trained,
        "best_rate": {kind: args.rates[at] for kind, at in best.items()},
        "error": {kind: geometric_mean(errors[kind], at) for kind, at in best.items()},
        "wins": {
            f"{one} over {other}": sum(
                a[best[one]] < b[best[other]] for a, b in zip(errors[one], errors[other], strict=True)
            )
            for one, other in PAIRS
        },
        "errors": errors,
    }


def best_rate(errors: list[list[float]]) -> int:
    """Number of the rate with the smallest geometric mean of the seeds' errors."""
    return min(range(len(errors[0])), key=lambda at: geometric_mean(errors, at))


def geometric_mean(errors: list[list[float]], rate: int) -> float:
    """Geometric mean over the seeds: errors differ by orders of magnitude."""
    return math.exp(sum(math.log(max(row[rate], 1e-30)) for row in errors) / len(errors))


def draw_choices(choices: list[dict[str, Any]], file: Path) -> None:
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


def draw(curves: dict[tuple[str, str], tuple[list[int], torch.Tensor]], rate: float, file: Path) -> None:
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


def write(
    args: argparse.Namespace, began: float, rows: list[dict[str, Any]], choices: list[dict[str, Any]]
) -> dict[str, str]:
    """Writes all numbers, if asked to; returns the versions that it tells with them."""
    versions = {"torch": torch.__version__, "python": platform.python_version(), "device": "cpu"}
    if args.json:
        told = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
        seconds = round(time.perf_counter() - began, 1)
        report = {"options": told, "versions": versions, "seconds": seconds, "gates": rows, "choice": choices}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return versions


def gates_table(args: argparse.Namespace, shown: float) -> list[dict[str, Any]]:
    """Trains students with all shapes on offer, prints a row each, and draws their gates."""
    rows, curves = [], {}
    print(
        "| teacher | start | lr | found by gates | by energy | gates on right (uniform) "
        "| energy on right | error |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    at = args.rates.index(shown) * args.seeds
    for name in args.teachers:
        for start in STARTS:
            found, runs = run_offered(name, start, args)
            curves[name, start] = runs.steps, runs.gates[:, at : at + args.seeds]
            rows += found
            for row in found:
                print(
                    f"| {name} | {start} | {row['lr']:g} | {row['found_by_gates']}/{row['seeds']} "
                    f"| {row['found_by_energy']}/{row['seeds']} "
                    f"| {row['gates_on_right']:.2f} ({row['uniform']:.2f}) | {row['energy_on_right']:.2f} "
                    f"| {row['error']:.1e} |",
                    flush=True,
                )
    if args.figure:
        draw(curves, shown, args.figure)
    return rows


def choices_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Chooses shapes for every teacher, with white and with correlated inputs, and prints a row each."""
    print(
        f"\n| teacher | inputs | first chosen is right | all parts chosen | outer products | parameters "
        f"| {' | '.join(KINDS)} | {' | '.join(f'{one} beats {other}' for one, other in PAIRS)} |"
    )
    print("|---" * (6 + len(KINDS) + len(PAIRS)) + "|", flush=True)
    choices = []
    for correlated in (False, True):
        for name in (*args.teachers, *HARDER):
            found = choose(name, correlated, args) | {"options": args.rates}
            choices.append(found)
            print(
                f"| {name} | {found['inputs']} | {found['first_is_right']}/{found['seeds']} "
                f"| {found['all_are_chosen']}/{found['seeds']} | {found['outer_products']:.0%} "
                f"| {found['parameters']:.0f} of {found['budget']} "
                f"| {' | '.join(f'{value:.1e}' for value in found['error'].values())} "
                f"| {' | '.join(f'{wins}/{args.trained}' for wins in found['wins'].values())} |",
                flush=True,
            )
    if args.choices_figure:
        draw_choices(choices, args.choices_figure)
    return choices


def main() -> None:
    """Trains, prints tables, writes JSON and a figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["gates", "choices"],
        choices=["gates", "choices"],
        help="what to measure: what gates find, or what the first gradient chooses and what that is worth",
    )
    parser.add_argument("--seeds", type=int, default=20, help="seeds of teacher and student")
    parser.add_argument(
        "--teachers", nargs="+", default=list(TEACHERS), choices=list(TEACHERS), help="teachers to train on"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 1e-2, 5e-2], help="learning rates")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--tokens", type=int, default=64, help="random inputs a step")
    parser.add_argument("--first-tokens", type=int, default=512, help="random inputs of the first gradient")
    parser.add_argument(
        "--components", type=int, default=10, help="components of the chosen and diverse students"
    )
    parser.add_argument(
        "--trained", type=int, default=20, help="seeds whose chosen and diverse students are trained"
    )
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    parser.add_argument("--figure", type=Path, help="PNG to draw the gates into")
    parser.add_argument("--choices-figure", type=Path, help="PNG to draw the errors of chosen shapes into")
    parser.add_argument(
        "--shown", type=float, help="learning rate of the figure; default the middle one of --rates"
    )
    args = parser.parse_args()
    shown = args.rates[len(args.rates) // 2] if args.shown is None else args.shown
    if shown not in args.rates:
        parser.error(f"--shown {shown} is none of --rates")
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    choices: list[dict[str, Any]] = []
    if "gates" in args.parts:
        rows = gates_table(args, shown)
        write(args, began, rows, [])  # the choices below take as long again
    if "choices" in args.parts:
        choices = choices_table(args)
    versions = write(args, began, rows, choices)
    print(f"\n{time.perf_counter() - began:.0f} s, {versions}")


if __name__ == "__main__":
    main()
