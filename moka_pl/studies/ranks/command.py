"""Trainings on several GPUs, measured one after another; ``scripts/data_parallel_speed.py`` runs it."""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from moka_pl.errors import ConfigError
from moka_pl.studies.common import (
    Parser,
    one_line_errors,
    positive_int,
    positive_number,
    versions,
    write_json,
)
from moka_pl.studies.outputs import REPLACED, has_keys, json_output
from moka_pl.studies.ranks.cases import BLOCK, GROUPS, Case
from moka_pl.studies.ranks.runs import LENGTH, run_to_end, write_texts
from moka_pl.studies.ranks.tables import cells, heads

DESCRIPTION = f"""\
Measures trainings on several GPUs, through the command line that users run.

    python scripts/data_parallel_speed.py --devices 1 2 4 --cuda-graphs --json ddp.json
    python scripts/data_parallel_speed.py --shape llama2-13b --strategy ddp sharded --devices 2 --offload
    python scripts/data_parallel_speed.py --groups ddp limited 13b 70b resume --json gpus.json

Each trains a 4-bit model of a known shape with random weights (nothing is downloaded) on rows of 512 tokens,
and prints the median of the tokens per second, the highest peak of a GPU's memory, the seconds from the
command to the first step, and the size of a checkpoint with the seconds that it cost the training. The median
is over blocks of {BLOCK} steps, in each of which one step logs; nothing waits for the GPU within or between
blocks. A training that fails is a row, too; the status is 1 if all do. Groups: {", ".join(GROUPS)}.

The JSON file also holds the parts of every step, on the host and on the GPU, of every rank. --profile
keeps beside that file which hooks of rank 0 take time on the host (hooks), which lines of code wait for the
GPU (waits), and all operations on both (host, gpu, trace), for the {2 * BLOCK} steps before the last timed
one. Profiled steps are slower.
"""

#: What clocks tell of losses: the sum over this rank's tokens, and their number.
_LOSS = ("losses", "scored")


@one_line_errors("data_parallel_speed")
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table, row by row.

    Args:
        arguments: Default: the process's.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.profile and args.json is None:
        parser.error("--profile needs --json, beside which profiles are kept")
    if args.groups:
        cases = [case for name in args.groups for case in GROUPS[name]]
    else:
        base = Case(
            args.shape,
            batch_size=args.batch_size,
            blocks=args.blocks,
            memory_limit=args.memory_limit,
            cuda_graphs=args.cuda_graphs,
            offload=args.offload,
        )
        cases = [replace(base, strategy=s, devices=n) for n in args.devices for s in args.strategy]
    rows: list[dict[str, Any]] = []
    print("  ".join(heads()), flush=True)
    for case in cases:
        profiles = args.json.with_suffix(".profiles") if args.profile else None
        rows.append(measured(case, args.timeout, args.accelerator, profiles))
        print("  ".join(cells(rows[-1], rows)), flush=True)
        if args.json is not None:
            write_json(args.json, {"versions": versions(), "rows": rows}, indent=1)
    if all("error" in row for row in rows):
        parser.exit(1, "data_parallel_speed: no training succeeded\n")


def measured(
    case: Case, timeout: float, accelerator: str = "gpu", profiles: Path | None = None
) -> dict[str, Any]:
    """Runs a training, and returns what was measured, or why it failed.

    Args:
        case: The training.
        timeout: Seconds after which it is ended.
        accelerator: Lightning's name of the devices' kind.
        profiles: A folder for profiles of it; None makes none.

    Returns:
        The case's options with ``tokens_per_second`` (median), ``peak_gib`` (highest of all ranks) and the
        others of :func:`_result`; or with ``error``.
    """
    row = case.as_dict()
    with tempfile.TemporaryDirectory() as folder:
        try:
            if case.resumes is None:
                found = _run(case, Path(folder) / "run", timeout, accelerator, profiles=profiles)
                return row | found
            strategy, devices = case.resumes
            first = replace(case, strategy=strategy, devices=devices, resumes=None)
            before = _run(first, Path(folder) / "first", timeout, accelerator)
            # As many rows in a step.
            resumed = replace(case, batch_size=case.batch_size * devices // case.devices)
            checkpoint = Path(before["checkpoint"])
            after = _run(resumed, Path(folder) / "second", timeout, accelerator, checkpoint, profiles)
        except ConfigError as error:
            return row | {"error": str(error)}
    return row | {"batch_size": resumed.batch_size} | after | {"before": before}


def _run(
    case: Case,
    folder: Path,
    timeout: float,
    accelerator: str,
    checkpoint: Path | None = None,
    profiles: Path | None = None,
) -> dict[str, Any]:
    """Runs a training in a folder.

    Args:
        case: The training.
        folder: For its data and its log.
        timeout: Seconds after which it is ended.
        accelerator: Lightning's name of the devices' kind.
        checkpoint: What it resumes.
        profiles: A folder for its profiles.

    Raises:
        ConfigError: It failed, or took longer.
    """
    folder.mkdir()
    write_texts(folder / "texts.jsonl", rows=case.steps * case.batch_size * case.devices)
    # Each rank runs the same command, and so limits its own GPU.
    command = [sys.executable, "-m", "moka_pl"]
    if case.memory_limit is not None:
        command = [sys.executable, "-m", "moka_pl.studies.ranks.limited", str(case.memory_limit)]
    begun = case.steps if checkpoint is not None else 0
    options = _options(case, folder, begun) | {"trainer.accelerator": accelerator}
    if profiles is not None:
        options |= _profiling(profiles / case.name)
    if checkpoint is not None:
        options |= {"ckpt_path": checkpoint, "model.allow_changes": '["ranks", "batch_size", "scheduler"]'}
    command += ["fit", "--config", "configs/llama2_ddp.yaml", *(f"--{k}={v}" for k, v in options.items())]
    begun_at = time.time()
    run_to_end(command, folder / "output.txt", timeout)
    clocks = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("clock-*.json"))]
    if len(clocks) != case.devices:
        raise ConfigError(f"{len(clocks)} of {case.devices} processes trained to the end")
    return _result(clocks, begun_at, next(folder.rglob("last.ckpt")))


def _options(case: Case, folder: Path, begun: int) -> dict[str, Any]:
    """Returns the options of a training.

    Args:
        case: The training.
        folder: Where its texts are, and where its log and the clocks' files go.
        begun: The step at which it begins.
    """
    return {
        "model.backbone.name": case.shape,
        "model.backbone.weights": "random",
        "model.cuda_graphs": str(case.cuda_graphs).lower(),
        "model.gradient_checkpointing": "offload" if case.offload else "true",
        "data": "moka_pl.data.TextData",
        "data.init_args.path": folder / "texts.jsonl",
        "data.init_args.batch_size": case.batch_size,
        "data.init_args.max_length": LENGTH,
        "trainer.devices": case.devices,
        "trainer.strategy": case.strategy,
        "trainer.accumulate_grad_batches": 1,
        "trainer.max_epochs": -1,
        "trainer.max_steps": begun + case.steps,
        "trainer.limit_val_batches": 0,
        "trainer.val_check_interval": 1.0,
        "trainer.log_every_n_steps": BLOCK,
        "trainer.logger.init_args.save_dir": folder,
        "checkpoint.every_n_train_steps": begun + case.saves_at,
        "trainer.callbacks+": "moka_pl.studies.ranks.clock.StepClock",
        "trainer.callbacks.folder": folder,
        "trainer.callbacks.warmup": case.warmup,
        "trainer.callbacks.saves_at": case.saves_at,
    }


def _profiling(folder: Path) -> dict[str, Any]:
    """Returns the options that write a training's profiles into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "trainer.callbacks.profile": folder.absolute(),
        "trainer.profiler": "lightning.pytorch.profilers.SimpleProfiler",
        "trainer.profiler.dirpath": folder.absolute(),
        "trainer.profiler.filename": "hooks",
    }


def _result(clocks: list[dict[str, Any]], begun_at: float, checkpoint: Path) -> dict[str, Any]:
    """Puts the clocks of all ranks together.

    Args:
        clocks: What :class:`StepClock` wrote, in the ranks' order.
        begun_at: When the command was started.
        checkpoint: The last checkpoint.
    """
    speeds = [
        sum(tokens for tokens, _ in block) / max(seconds for _, seconds in block)
        for block in zip(*(clock["blocks"] for clock in clocks), strict=True)
    ]
    losses, scored = (list(map(sum, zip(*(clock[n] for clock in clocks), strict=True))) for n in _LOSS)
    first = clocks[0]
    saving = [clock["saving"] for clock in clocks if clock["saving"] is not None]
    reserved = [clock["reserved_gib"] for clock in clocks if clock["reserved_gib"] is not None]
    return {
        "device": first["device"],
        "tokens_per_second": median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "blocks_tokens_per_second": speeds,
        "steps": [clock["steps"] for clock in clocks],
        "peak_gib": max(clock["peak_gib"] for clock in clocks),
        "reserved_gib": max(reserved, default=None),
        "first_step_seconds": first["stages"]["first_step"] - begun_at,
        "stages": {name: moment - begun_at for name, moment in first["stages"].items()},
        "checkpoint": str(checkpoint),
        "checkpoint_mb": checkpoint.stat().st_size / 1e6,
        "checkpoint_seconds": max(saving, default=None),
        "begun_at": first["begun_at"],
        "ended_at": first["ended_at"],
        "position": first["position"],
        "losses": [loss / max(1, count) for loss, count in zip(losses, scored, strict=True)],
        "rows": [sum(step) for step in zip(*(clock["sums"] for clock in clocks), strict=True)],
    }


def _parser() -> Parser:
    parser = Parser("data_parallel_speed", DESCRIPTION)
    parser.add_argument("--devices", type=positive_int, nargs="+", default=[1, 2], help="numbers of GPUs")
    parser.add_argument("--shape", default="llama2-7b", help="shape of the model (see BackboneConfig.name)")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="rows of 512 tokens per GPU")
    parser.add_argument(
        "--blocks",
        type=positive_int,
        default=Case.blocks,
        help=f"blocks of {BLOCK} timed steps, after 10 others",
    )
    parser.add_argument(
        "--strategy", nargs="+", default=["ddp"], help="as for --trainer.strategy, such as sharded"
    )
    parser.add_argument("--memory-limit", type=positive_number, help="GiB of each GPU that may be used")
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="replay the steps as CUDA graphs (ddp only)"
    )
    parser.add_argument(
        "--offload", action="store_true", help="keep the inputs of checkpointed layers in the host's memory"
    )
    parser.add_argument(
        "--groups", nargs="+", choices=GROUPS, help="trainings instead of those that the options describe"
    )
    parser.add_argument(
        "--timeout", type=positive_number, default=600, help="seconds after which a training is ended"
    )
    parser.add_argument("--accelerator", default="gpu", help="cpu to try the command out")
    parser.add_argument(
        "--json",
        type=json_output(has_keys("versions", "rows")),
        help=f"a file for the rows so far, rewritten after each of them; {REPLACED}",
    )
    parser.add_argument("--profile", action="store_true", help="keep profiles in a folder beside --json")
    return parser
