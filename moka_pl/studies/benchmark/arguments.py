"""The benchmark's arguments, and what they ask for."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moka_pl.errors import ConfigError
from moka_pl.studies.benchmark import cases, context, fit, growth, steps, unsloth
from moka_pl.studies.benchmark.cases import PRESETS, Preset, find_preset
from moka_pl.studies.benchmark.tables import figures_output
from moka_pl.studies.benchmark.unsloth import Home
from moka_pl.studies.common import Parser
from moka_pl.studies.outputs import REPLACED, REPLACED_PICTURE, has_keys, json_output

GROWTH = ("components", "tokens", "sizes")
MEASURES = ("steps", *GROWTH, "fit", "decode")
_PRESET, _MEASURE = "smollm2-cpu", ["steps"]
_GROUPS = {"all": MEASURES, "growth": GROWTH}
_CHECKPOINTING = {"off": [False], "on": [True], "both": [False, True]}

_DESCRIPTION = """\
Times MoKA beside the frozen base and PEFT's adapters. Models have random NF4 weights; nothing is downloaded.

    python scripts/benchmark.py                              # SmolLM2's shape, two minutes on two CPU cores
    python scripts/benchmark.py --preset llama2-7b-h100      # LLaMA2-7B's shape on a GPU, 8 x 512 tokens

All rows of a table run in one process on one model; the frozen base runs first and again last, to show how
far the machine drifted. A step is forward and backward; times are medians. A row that fails is reported, and
the others go on.
"""


@dataclass(frozen=True)
class Plan:
    """What a run of the benchmark does.

    Attributes:
        preset: Model, batch and device.
        measures: Some of ``MEASURES``.
        checkpointing: Without and with, in this order.
        names: Only these rows; all for none.
        liger: Whether rows are without Liger's kernels, but for two more with them.
        unsloth: Where unsloth is; None for no rows of it.
        search: How to search the longest row of tokens; None for not at all.
        profiled: Whether to count launches.
        offload: Whether checkpointing keeps the layers' inputs in the host's memory.
        turns: How many times the rows of ``steps`` are measured in turns; 0 for one after another.
        command: The command that says the same.
    """

    preset: Preset
    measures: tuple[str, ...]
    checkpointing: tuple[bool, ...]
    names: tuple[str, ...]
    liger: bool
    unsloth: Home | None
    search: context.Search | None
    profiled: bool
    offload: bool
    turns: int
    command: str


def make_plan(args: argparse.Namespace) -> Plan:
    """Turns parsed arguments into a plan.

    Raises:
        ConfigError: For an unknown preset or row, a number out of range, or figures of nothing.
    """
    preset = find_preset(args.preset)
    if args.context and preset.device == "cpu":
        raise ConfigError(f"--context searches a GPU's memory, but preset {preset.name} runs on the CPU")
    if any(card < 1 for card in args.context):
        raise ConfigError(f"--context takes GiB from 1 on, not {min(args.context)}")
    asked = {part for name in _measures(args) for part in _GROUPS.get(name, (name,))}
    measures = tuple(name for name in MEASURES if name in asked)
    if args.steps is not None:
        if args.steps < 1:
            raise ConfigError(f"--steps must be at least 1, not {args.steps}")
        preset = replace(preset, steps=args.steps, fit_steps=args.steps)
    if args.turns < 0:
        raise ConfigError(f"--turns must be at least 0, not {args.turns}")
    if args.turns and args.profile:
        raise ConfigError("--profile counts a step's launches, which --turns does not; leave one of them out")
    if args.figures and not set(GROWTH) & set(measures):
        raise ConfigError("--figures draws growth; add --measure growth, or all")
    known = row_names(preset.device, measures, args.liger, args.unsloth is not None)
    if args.context:
        theirs = unsloth.CONTEXT_ROWS if args.unsloth is not None else ()
        names = [*(row.name for row in context.ROWS), *(row.name for row in theirs)]
        known += [name for name in names if name not in known]
    for name in args.rows:
        if name not in known:
            raise ConfigError(f"unknown row {name!r}; choose some of {', '.join(known)}")
    return Plan(
        preset,
        measures,
        tuple(_CHECKPOINTING[args.checkpointing]),
        tuple(args.rows),
        args.liger,
        None if args.unsloth is None else Home.parse(args.unsloth),
        _search(args, preset),
        args.profile,
        args.offload,
        args.turns,
        _command(args),
    )


def row_names(
    device: str, measures: Sequence[str], with_liger: bool = False, with_unsloth: bool = False
) -> list[str]:
    """Names of all rows of these measures.

    Args:
        device: ``cpu`` or ``cuda``.
        measures: Some of ``MEASURES``.
        with_liger: Whether there are rows with Liger.
        with_unsloth: Whether there are rows of unsloth.
    """
    names: list[str] = []
    if "steps" in measures:
        names += [row.name for row in unsloth.ROWS] if with_unsloth else []
        names += [row.name for row in step_rows(device, with_liger, named=True)]
    if set(GROWTH) & set(measures):
        names += growth.growth_rows(device)
    if "fit" in measures:
        names += fit.ROWS
    if "decode" in measures:
        names += [row.name for row in steps.decode_rows()]
    return list(dict.fromkeys(names))


def step_rows(device: str, with_liger: bool, named: bool) -> list[cases.Row]:
    """All rows of steps; those on other quantisers only for a choice by name.

    Args:
        device: ``cpu`` or ``cuda``.
        with_liger: Whether there are rows with Liger.
        named: Whether rows are chosen by name.
    """
    rows = cases.step_rows(device, quantisers=named)
    return cases.beside_liger(rows) if with_liger else rows


def _search(args: argparse.Namespace, preset: Preset) -> context.Search | None:
    """How to search the longest row of tokens.

    Raises:
        ConfigError: For options of a search that is not asked for, or out of range.
    """
    for name in ("seconds", "layers"):
        value = getattr(args, name)
        if value is not None and not args.context:
            raise ConfigError(f"--{name} is an option of --context; give the sizes of cards, or leave it out")
        if value is not None and value <= 0:
            raise ConfigError(f"--{name} must be above 0, not {value}")
    if not args.context:
        return None
    seconds = preset.context_seconds if args.seconds is None else args.seconds
    return context.Search(tuple(args.context), seconds, args.layers)


def _measures(args: argparse.Namespace) -> list[str]:
    """What to measure besides the context; unless told, steps if that is not asked for."""
    return args.measure or ([] if args.context else _MEASURE)


def _command(args: argparse.Namespace) -> str:
    """The command with the options that decide what is measured."""
    parts = ["python", "scripts/benchmark.py"]
    if args.preset != _PRESET:
        parts += ["--preset", args.preset]
    if args.measure and (args.context or args.measure != _MEASURE):
        parts += ["--measure", *args.measure]
    if args.checkpointing != "off":
        parts += ["--checkpointing", args.checkpointing]
    if args.steps is not None:
        parts += ["--steps", str(args.steps)]
    if args.turns:
        parts += ["--turns", str(args.turns)]
    asked = {
        "liger": args.liger,
        "unsloth": args.unsloth is not None,
        "profile": args.profile,
        "offload": args.offload,
    }
    parts += [f"--{name}" for name, wanted in asked.items() if wanted]
    if args.context:
        parts += ["--context", *map(str, args.context)]
        parts += ["--seconds", f"{args.seconds:g}"] if args.seconds is not None else []
        parts += ["--layers", str(args.layers)] if args.layers is not None else []
    if args.rows:
        parts += ["--rows", *args.rows]
    return shlex.join(parts)


def make_parser() -> Parser:
    """Makes the parser of the command line."""
    parser = Parser("benchmark", _DESCRIPTION)
    parser.add_argument(
        "--preset",
        default=_PRESET,
        metavar="NAME",
        help=f"model, batch and device; one of {', '.join(PRESETS)}",
    )
    parser.add_argument(
        "--measure",
        nargs="+",
        choices=(*MEASURES, *_GROUPS),
        default=[],
        help="steps: a training step of every row (default); components, tokens, sizes: over the number of "
        "components, the tokens of a batch, shapes of models; growth: these three; fit: a whole Lightning "
        "fit beside a bare loop; decode: generation",
    )
    parser.add_argument(
        "--checkpointing", choices=_CHECKPOINTING, default="off", help="gradient checkpointing (default off)"
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="checkpointing keeps the layers' inputs in the host's memory, as unsloth's does",
    )
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="only these rows")
    parser.add_argument("--steps", type=int, metavar="N", help="measured steps, instead of the preset's")
    turns = "measure the rows of steps N times in turns, --steps steps each: for machines that drift"
    parser.add_argument("--turns", type=int, default=0, metavar="N", help=turns)
    parser.add_argument(
        "--liger",
        action="store_true",
        help="rows are on a base without Liger's kernels, and two more on one with them (needs a GPU)",
    )
    parser.add_argument(
        "--unsloth",
        nargs="?",
        const="",
        metavar="WHERE",
        help="add rows of unsloth's LoRA, in a process of their own; WHERE is the Python of another "
        "environment or a folder of packages, where this environment lacks it",
    )
    parser.add_argument(
        "--profile", action="store_true", help="count what a step launches on the GPU, in one more step"
    )
    _add_search(parser)
    parser.add_argument(
        "--json",
        type=json_output(has_keys("format", "preset", "command", "records")),
        metavar="FILE",
        help=f"write all values, versions and the device; {REPLACED}",
    )
    parser.add_argument(
        "--figures",
        type=figures_output,
        metavar="DIR",
        help=f"draw growth as PNG files; {REPLACED_PICTURE}",
    )
    return parser


def _add_search(parser: Parser) -> None:
    parser.add_argument(
        "--context",
        nargs="+",
        type=int,
        default=[],
        metavar="GIB",
        help="search for the longest row with which a step with checkpointing fits into cards of these sizes "
        "(without --measure: only that)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="with --context: time for each row's search "
        f"(default {Preset.context_seconds:g}), after which lengths are predicted",
    )
    parser.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="with --context: run the first N layers only, all of them for the smallest card's longest row; "
        "with checkpointing their number hardly changes the memory of a step, but its time",
    )
