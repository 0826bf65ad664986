#!/usr/bin/env python3
"""Do gates find structure? Trains one layer towards updates of known structure, over many seeds.

    python scripts/teachers.py --json teachers.json --figure teachers.png

Prints Markdown. For every teacher, start and learning rate: how often the components with the largest gates
(or with the largest part ‖α A ⊗ B‖² of the update) are exactly the right ones, the share of gates and of
energy on those, and the error that is left. `random` is MoKA's start, `gradient` starts the left factors
along the first gradient. Then, what would be chosen from that gradient without training, and what students
of those shapes reach beside the diverse ones of as many parameters.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from moka_pl.analysis.choice import choose_shapes
from moka_pl.analysis.teachers import (
    OFFERED,
    SIDE,
    TEACHERS,
    Runs,
    Students,
    first_gradients,
    found_parts,
    of_right_shapes,
    teacher,
    train,
)
from moka_pl.filters import filter_shapes

STARTS = ("random", "gradient")


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


def choose(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Chooses shapes from each seed's first gradient, and trains students of them beside diverse ones."""
    parts = [OFFERED[i] for i in TEACHERS[name]]
    r = args.components
    diverse = filter_shapes("diverse", r, SIDE, SIDE)
    budget = sum(shape.num_parameters for shape in diverse)
    seeds = range(args.seeds)
    targets = torch.stack([teacher(parts, SIDE, seed) for seed in seeds])
    gradients = first_gradients(targets, seeds, args.first_tokens)
    chosen = [choose_shapes(gradient, r, budget) for gradient in gradients]
    errors: dict[str, list[float]] = {"diverse": [], "auto": [], "auto, gradient start": []}
    for kind in errors:
        for seed in range(args.trained):
            shapes = diverse if kind == "diverse" else chosen[seed]
            students = Students(shapes, SIDE, [seed] * len(args.rates))
            if kind.endswith("start"):
                students.start_along(gradients[seed][None].expand(len(args.rates), -1, -1))
            many = targets[seed][None].expand(len(args.rates), -1, -1)
            errors[kind].append(train(students, many, args.rates, args.steps, args.tokens).error.tolist())
    best = {
        kind: min(torch.tensor(found).mean(0).tolist()) if found else None for kind, found in errors.items()
    }
    return {
        "teacher": name,
        "first_is_right": sum(shapes[0] in parts for shapes in chosen),
        "all_are_chosen": sum(set(parts) <= set(shapes) for shapes in chosen),
        "seeds": args.seeds,
        "example": [str(shape) for shape in chosen[0]],
        "budget": budget,
        "parameters": sum(s.num_parameters for shapes in chosen for s in shapes) / len(chosen),
        "trained": args.trained,
        "error": best,
        "errors": errors,
    }


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


def main() -> None:
    """Trains, prints tables, writes JSON and a figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
        "--trained", type=int, default=5, help="seeds whose chosen and diverse students are trained"
    )
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    parser.add_argument("--figure", type=Path, help="PNG to draw the gates into")
    parser.add_argument(
        "--shown", type=float, help="learning rate of the figure; default the middle one of --rates"
    )
    args = parser.parse_args()
    shown = args.rates[len(args.rates) // 2] if args.shown is None else args.shown
    if shown not in args.rates:
        parser.error(f"--shown {shown} is none of --rates")
    began = time.perf_counter()
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
    write(args, began, rows, [])  # the choices below take as long again
    print(
        "\n| teacher | first chosen is right | all parts chosen | parameters "
        "| error: diverse | auto | auto, gradient start |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    choices = []
    for name in args.teachers:
        found = choose(name, args)
        choices.append(found)
        errors = [f"{v:.1e}" if v is not None else "" for v in found["error"].values()]
        print(
            f"| {name} | {found['first_is_right']}/{found['seeds']} "
            f"| {found['all_are_chosen']}/{found['seeds']} "
            f"| {found['parameters']:.0f} of {found['budget']} | {' | '.join(errors)} |",
            flush=True,
        )
    versions = write(args, began, rows, choices)
    print(f"\n{time.perf_counter() - began:.0f} s, {versions}")


if __name__ == "__main__":
    main()
