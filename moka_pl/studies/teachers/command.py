"""The command behind ``scripts/teachers.py``: trains, prints tables, and writes JSON and figures."""

import argparse
import platform
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from moka_pl.studies.common import Parser, one_line_errors, positive_int, positive_number, write_json
from moka_pl.studies.outputs import REPLACED, REPLACED_PICTURE, has_keys, json_output, picture_output
from moka_pl.studies.teachers.model import HARDER, TEACHERS
from moka_pl.studies.teachers.study import (
    KINDS,
    PAIRS,
    STARTS,
    ResultRow,
    TeacherStudy,
    draw_choices,
    draw_gates,
    run_chosen,
    run_offered,
)

DESCRIPTION = """\
Do gates find structure? Trains one layer towards updates of known structure, over many seeds.

Prints Markdown. For every teacher, start and learning rate: how often the components with the largest gates
(or with the largest part ‖α A ⊗ B‖² of the update) are exactly the right ones, the share of gates and of
energy on those, and the remaining error. `random` is MoKA's start, `gradient` starts the left factors along
the first gradient. Then: which shapes that gradient would choose without training, and how well students of
those shapes do beside diverse ones with as many parameters, from either start, also with correlated inputs
and for teachers that a few products cannot express.
"""


@one_line_errors("teachers")
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, prints tables, writes JSON and figures.

    Args:
        arguments: Default: the process's.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    shown = args.rates[len(args.rates) // 2] if args.shown is None else args.shown
    if shown not in args.rates:
        parser.error(f"--shown {shown} is not among --rates")
    options = {field.name: getattr(args, field.name) for field in fields(TeacherStudy)}
    study = TeacherStudy(**options | {"rates": tuple(args.rates)})
    began = time.perf_counter()
    rows: list[ResultRow] = []
    choices: list[ResultRow] = []
    if "gates" in args.parts:
        rows = _gates_table(args.teachers, study, shown, args.figure)
        _write(args, began, rows, [])  # the choices below take as long again
    if "choices" in args.parts:
        choices = _choices_table(args.teachers, study, args.choices_figure)
    versions = _write(args, began, rows, choices)
    print(f"\n{time.perf_counter() - began:.0f} s, {versions}")


def _gates_table(
    teachers: Sequence[str], study: TeacherStudy, shown: float, figure: Path | None
) -> list[ResultRow]:
    """Trains students with all shapes on offer, prints a row each, and draws their gates."""
    rows: list[ResultRow] = []
    curves = {}
    print(
        "| teacher | start | lr | found by gates | by energy | gates on right (uniform) "
        "| energy on right | error |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    at = study.rates.index(shown) * study.seeds
    for name in teachers:
        for start in STARTS:
            of_start, runs = run_offered(name, start, study)
            curves[name, start] = runs.steps, runs.gates[:, at : at + study.seeds]
            rows += of_start
            for row in of_start:
                print(
                    f"| {name} | {start} | {row['lr']:g} | {row['found_by_gates']}/{row['seeds']} "
                    f"| {row['found_by_energy']}/{row['seeds']} "
                    f"| {row['gates_on_right']:.2f} ({row['uniform']:.2f}) | {row['energy_on_right']:.2f} "
                    f"| {row['error']:.1e} |",
                    flush=True,
                )
    if figure is not None:
        draw_gates(curves, shown, figure)
    return rows


def _choices_table(teachers: Sequence[str], study: TeacherStudy, figure: Path | None) -> list[ResultRow]:
    """Chooses shapes for every teacher, with white and with correlated inputs, and prints a row each."""
    print(
        f"\n| teacher | inputs | first chosen is right | all parts chosen | outer products | parameters "
        f"| {' | '.join(KINDS)} | {' | '.join(f'{one} beats {other}' for one, other in PAIRS)} |"
    )
    print("|---" * (6 + len(KINDS) + len(PAIRS)) + "|", flush=True)
    choices: list[ResultRow] = []
    for correlated in (False, True):
        for name in (*teachers, *HARDER):
            choice = run_chosen(name, correlated, study)
            choices.append(choice)
            print(
                f"| {name} | {choice['inputs']} | {choice['first_is_right']}/{choice['seeds']} "
                f"| {choice['all_are_chosen']}/{choice['seeds']} | {choice['outer_products']:.0%} "
                f"| {choice['parameters']:.0f} of {choice['budget']} "
                f"| {' | '.join(f'{value:.1e}' for value in choice['error'].values())} "
                f"| {' | '.join(f'{wins}/{study.trained}' for wins in choice['wins'].values())} |",
                flush=True,
            )
    if figure is not None:
        draw_choices(choices, figure)
    return choices


def _write(
    args: argparse.Namespace, began: float, rows: list[ResultRow], choices: list[ResultRow]
) -> dict[str, str]:
    """Writes all numbers, if asked to; returns the versions that it tells with them."""
    about = {"torch": torch.__version__, "python": platform.python_version(), "device": "cpu"}
    if args.json:
        seconds = round(time.perf_counter() - began, 1)
        report = {"options": vars(args), "versions": about, "seconds": seconds}
        write_json(args.json, report | {"gates": rows, "choice": choices}, 1)
    return about


def _parser() -> Parser:
    parser = Parser("teachers", DESCRIPTION)
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["gates", "choices"],
        choices=["gates", "choices"],
        help="measure what gates find, or what the first gradient chooses and how well that trains",
    )
    parser.add_argument(
        "--seeds", type=positive_int, default=TeacherStudy.seeds, help="seeds of teacher and student"
    )
    parser.add_argument(
        "--teachers", nargs="+", default=list(TEACHERS), choices=list(TEACHERS), help="teachers to train on"
    )
    parser.add_argument(
        "--rates", type=positive_number, nargs="+", default=[1e-3, 1e-2, 5e-2], help="learning rates"
    )
    parser.add_argument("--steps", type=positive_int, default=TeacherStudy.steps, help="optimizer steps")
    parser.add_argument(
        "--tokens", type=positive_int, default=TeacherStudy.tokens, help="random inputs per step"
    )
    parser.add_argument(
        "--first-tokens",
        type=positive_int,
        default=TeacherStudy.first_tokens,
        help="random inputs of the first gradient",
    )
    parser.add_argument(
        "--components",
        type=positive_int,
        default=TeacherStudy.components,
        help="components of the chosen and diverse students",
    )
    parser.add_argument(
        "--trained",
        type=positive_int,
        default=TeacherStudy.trained,
        help="number of seeds for training chosen and diverse students",
    )
    known = has_keys("options", "versions", "seconds", "gates", "choice")
    parser.add_argument("--json", type=json_output(known), help=f"JSON file for all numbers; {REPLACED}")
    parser.add_argument("--figure", type=picture_output, help=f"picture of the gates; {REPLACED_PICTURE}")
    parser.add_argument(
        "--choices-figure", type=picture_output, help="picture of the errors of chosen shapes, likewise"
    )
    parser.add_argument(
        "--shown", type=float, help="learning rate of the figure (default: the middle one of --rates)"
    )
    return parser
