"""The command behind ``scripts/harness_agreement.py``."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moka_pl.errors import MokaError
from moka_pl.studies.agreement.agreement import TOLERANCE, Agreement, agreement_table, compare

DESCRIPTION = f"""\
Compares moka_pl's evaluation with the lm-evaluation-harness, item for item, on the same model, questions and
prompts, and exits with status 1 if they disagree: in the tokens of a question, in its acc or acc_norm, in a
log-likelihood by more than {TOLERANCE:g} nats, or in what Lightning's test reports.
"""
TASKS = ["arc_easy", "arc_challenge", "openbookqa", "boolq"]
SUBJECTS = ["astronomy", "global_facts", "philosophy"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the options (default: the process's), compares, and prints the table."""
    args = _parser().parse_args(arguments)
    if args.data is None and args.mmlu is None:
        _parser().error("nothing to compare; give --data, --mmlu, or both")
    try:
        found = list(compare_all(args))
    except MokaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(agreement_table(found))
    if args.json is not None:
        _write(args, found)
    if not all(task.agrees for task in found):
        sys.exit(1)


def compare_all(args: argparse.Namespace) -> Iterator[Agreement]:
    """Compares every wanted task, one after another.

    Args:
        args: The parsed options.
    """
    from moka_pl.evaluation.lm_eval.tasks import require_lm_eval

    require_lm_eval()
    from moka_pl.data import CommonsenseData, MmluData
    from moka_pl.evaluation.lm_eval.tasks import select_tasks
    from moka_pl.studies.agreement.sides import (
        copy_mmlu_questions,
        copy_questions,
        harness_items,
        own_items,
        reported,
    )

    chosen = range(args.skip, args.skip + args.items)
    module = build_module(args.model, args.random, args.adapter)
    with tempfile.TemporaryDirectory(prefix="moka_pl-agreement-") as scratch:
        if args.data is not None:
            folder = copy_questions(args.data, args.tasks, chosen, Path(scratch, "cloze"))
            theirs = harness_items(module, select_tasks(args.tasks, folder), args.max_length, args.batch_size)
            for task in args.tasks:
                data = CommonsenseData(
                    folder / task / "test.json",
                    validation_path=folder / task / "test.json",
                    max_length=args.max_length,
                    eval_batch_size=args.batch_size,
                )
                ours = own_items(module, data, args.batch_size)
                values = {} if args.no_test else reported(module, data)
                yield compare(task, ours, theirs[task], _of_task(values, task))
        if args.mmlu is not None:
            folder = copy_mmlu_questions(args.mmlu, args.subjects, chosen, Path(scratch, "mmlu"))
            names = [f"mmlu_{subject}" for subject in args.subjects]
            theirs = harness_items(module, select_tasks(names, folder), args.max_length, args.batch_size)
            for subject, name in zip(args.subjects, names, strict=True):
                mmlu = MmluData(
                    folder,
                    subjects=[subject],
                    max_length=args.max_length,
                    eval_batch_size=args.batch_size,
                )
                ours = own_items(module, mmlu, args.batch_size)
                values = {} if args.no_test else reported(module, mmlu)
                yield compare(name, ours, theirs[name], _of_task(values, name))


def build_module(model: str, random: bool, adapter: Path | None) -> Any:
    """A module with its model built, in float32 and without quantisation, on the CPU.

    Args:
        model: The base model, as in :class:`~moka_pl.backbone.BackboneConfig`.
        random: Random weights of that shape instead.
        adapter: An adapter directory to load; its base then replaces ``model``.
    """
    from moka_pl.adapters import read_adapter
    from moka_pl.backbone import BackboneConfig
    from moka_pl.training.module import MokaModule

    plain: dict[str, Any] = {"quantization": "none", "compute_dtype": "float32"}
    if adapter is None:
        config = BackboneConfig(model, weights="random" if random else "pretrained", **plain)
    else:
        base = read_adapter(adapter).base
        config = BackboneConfig(base.name, base.revision, **(base.options | plain))
    module = MokaModule(config, adapter_path=None if adapter is None else str(adapter))
    module.configure_model()
    return module


def _of_task(values: dict[str, float], task: str) -> dict[str, float]:
    names = ("accuracy", "acc_norm")
    return {name: values[f"{name}/{task}"] for name in names if f"{name}/{task}" in values}


def _write(args: argparse.Namespace, found: Sequence[Agreement]) -> None:
    from moka_pl.evaluation.lm_eval.results import versions

    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    content = {"versions": versions(), "options": options, "tasks": [asdict(task) for task in found]}
    args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument(
        "--data", type=Path, help="folder with a sub-folder for every task, each with test.json"
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="tasks of --data")
    parser.add_argument("--mmlu", type=Path, help="folder with MMLU's dev/ and test/ CSV files")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, help="subjects of --mmlu")
    parser.add_argument("--items", type=int, default=500, help="most questions per task")
    parser.add_argument("--skip", type=int, default=0, help="questions to leave out before them")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="base model, as in BackboneConfig")
    parser.add_argument("--random", action="store_true", help="random weights of that shape")
    parser.add_argument("--adapter", type=Path, help="adapter directory; its base replaces --model")
    parser.add_argument("--batch_size", type=int, default=8, help="questions (ours) or sequences (harness)")
    parser.add_argument("--max_length", type=int, default=4096, help="tokens of a question and its option")
    parser.add_argument("--no_test", action="store_true", help="leave out what Lightning's test reports")
    parser.add_argument("--json", type=Path, help="file for the comparison's numbers")
    return parser
