"""The command behind ``scripts/harness_agreement.py``: compares task by task, and prints a table."""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.studies.agreement.agreement import TOLERANCE, Agreement, agreement_table, compare
from moka_pl.studies.common import Parser, one_line_errors, positive_int, versions, write_json
from moka_pl.studies.outputs import REPLACED, has_keys, json_output

if TYPE_CHECKING:
    from moka_pl.data import MokaDataModule
    from moka_pl.training.module import MokaModule

DESCRIPTION = f"""\
Compares moka_pl's evaluation with the lm-evaluation-harness, item for item, on the same model, questions and
prompts, and exits with status 1 if they disagree: in the tokens of a question, in its acc or acc_norm, in a
log-likelihood by more than {TOLERANCE:g} nats, or in what Lightning's test reports.
"""
TASKS = ["arc_easy", "arc_challenge", "openbookqa", "boolq"]
_REPORTED = ("accuracy", "acc_norm")
SUBJECTS = ["astronomy", "global_facts", "philosophy"]


@one_line_errors("harness_agreement")
def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the options (default: the process's), compares, and prints the table."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.data is None and args.mmlu is None:
        parser.error("nothing to compare; give --data, --mmlu, or both")
    agreements = list(compare_all(args))
    print(agreement_table(agreements))
    if args.json is not None:
        tasks = [asdict(agreement) for agreement in agreements]
        packages = versions("lm_eval", "datasets")
        write_json(args.json, {"versions": packages, "options": vars(args), "tasks": tasks}, 2)
    if not all(agreement.agrees for agreement in agreements):
        sys.exit(1)


def compare_all(args: argparse.Namespace) -> Iterator[Agreement]:
    """Compares every wanted task, one after another.

    Args:
        args: The parsed options.
    """
    from moka_pl.evaluation.lm_eval.tasks import require_lm_eval

    require_lm_eval()
    from moka_pl.data import CommonsenseData, MmluData
    from moka_pl.studies.agreement.sides import copy_mmlu_questions, copy_questions

    chosen = range(args.skip, args.skip + args.items)
    options = {"max_length": args.max_length, "eval_batch_size": args.batch_size}
    module = build_module(args.model, args.random, args.adapter)
    with tempfile.TemporaryDirectory(prefix="moka_pl-agreement-") as scratch:
        if args.data is not None:
            folder = copy_questions(args.data, args.tasks, chosen, Path(scratch, "cloze"))
            files = {task: folder / task / "test.json" for task in args.tasks}
            data: dict[str, MokaDataModule] = {
                task: CommonsenseData(file, validation_path=file, **options) for task, file in files.items()
            }
            yield from _compare_tasks(module, folder, data, args)
        if args.mmlu is not None:
            folder = copy_mmlu_questions(args.mmlu, args.subjects, chosen, Path(scratch, "mmlu"))
            data = {f"mmlu_{s}": MmluData(folder, subjects=[s], **options) for s in args.subjects}
            yield from _compare_tasks(module, folder, data, args)


def _compare_tasks(
    module: "MokaModule", folder: Path, data: "dict[str, MokaDataModule]", args: argparse.Namespace
) -> Iterator[Agreement]:
    """Compares tasks of one folder, whose data modules are given by the tasks' names."""
    from moka_pl.evaluation.lm_eval.tasks import select_tasks
    from moka_pl.studies.agreement import sides

    selection = select_tasks(list(data), folder)
    harness = sides.harness_items(module, selection, args.max_length, args.batch_size)
    for task, questions in data.items():
        package = sides.package_items(module, questions, args.batch_size)
        values = {} if args.no_test else sides.reported(module, questions)
        reported = {name: values[f"{name}/{task}"] for name in _REPORTED if f"{name}/{task}" in values}
        yield compare(task, package, harness[task], reported)


def build_module(model: str, random: bool, adapter: Path | None) -> "MokaModule":
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


def _parser() -> Parser:
    parser = Parser("harness_agreement", DESCRIPTION)
    parser.add_argument(
        "--data", type=Path, help="folder with a sub-folder for every task, each with test.json"
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="tasks of --data")
    parser.add_argument("--mmlu", type=Path, help="folder with MMLU's dev/ and test/ CSV files")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, help="subjects of --mmlu")
    parser.add_argument(
        "--items", type=positive_int, default=500, help="maximum number of questions per task"
    )
    parser.add_argument("--skip", type=int, default=0, help="questions to skip before them")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="base model, as in BackboneConfig")
    parser.add_argument("--random", action="store_true", help="use random weights of that shape")
    parser.add_argument("--adapter", type=Path, help="adapter directory; its base replaces --model")
    parser.add_argument(
        "--batch-size", type=positive_int, default=8, help="questions (package), sequences (harness)"
    )
    parser.add_argument(
        "--max-length",
        type=positive_int,
        default=4096,
        help="maximum number of tokens of a question with an option",
    )
    parser.add_argument("--no-test", action="store_true", help="skip the comparison with Lightning's test")
    known = has_keys("versions", "options", "tasks")
    parser.add_argument("--json", type=json_output(known), help=f"JSON file for the results; {REPLACED}")
    return parser
