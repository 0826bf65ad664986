"""The command behind ``scripts/compare.py``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from moka_pl.compare.suite import Suite, find_suite, read_suite
from moka_pl.errors import MokaError

DESCRIPTION = """\
Trains every rival of a suite with every learning rate on the same batches, picks each one's rate on data that
are held out of the training data, tests the picked rate with all seeds, and compares the rivals on the same
test items.

What has ended is not done again, whether the command was interrupted or the suite has changed; runs that
failed are tried again. Data files are known by their names: if their content changes, use another --out.
"""

#: The status that a shell reports of a program that Ctrl-C has ended.
_INTERRUPTED = 130


def main(suites: Path, arguments: Sequence[str] | None = None) -> None:
    """Parses the options, runs the suite and prints its table.

    Args:
        suites: Folder of the suites that are known by name.
        arguments: Default: the process's.
    """
    args = _parser(suites).parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        suite = read_suite(find_suite(args.suite, suites), _changes(args), args.rivals)
        if args.jobs < 1:
            raise MokaError(f"--jobs must be at least 1, not {args.jobs}")
        _run(suite, args)
    except MokaError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        sys.exit(2)


def _run(suite: Suite, args: argparse.Namespace) -> None:
    from moka_pl.compare.build import check_suite
    from moka_pl.compare.report import make_report, markdown, write_report
    from moka_pl.compare.stages import collect, first_stage, run_suite
    from moka_pl.compare.store import Store

    check_suite(suite)
    folder = args.out / suite.name
    store = Store(folder)
    if args.plan:
        first = first_stage(suite)
        for task in first:
            print(f"{'done' if task.is_done(store) else 'to do':6} {task.run}")
        print(
            f"then {len(suite.rivals) * len(suite.seeds)} runs with the picked learning rates and their tests"
        )
        return
    try:
        entries = run_suite(suite, store, args.jobs)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was done is kept in {folder}: the same command goes on", file=sys.stderr)
        files = write_report(make_report(suite, collect(suite, store)), folder)
        print(f"what there is so far: {files[0]}", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    report = make_report(suite, entries)
    files = write_report(report, folder)
    print(f"\n{markdown(report)}")
    print("written: " + " ".join(str(file) for file in files))
    print(f"curves: tensorboard --logdir {store.folder}")
    if not any(entry.outcomes for entry in entries if entry.rate is not None):
        sys.exit(1)


def _changes(args: argparse.Namespace) -> list[str]:
    changes = list(args.set)
    if args.data is not None:
        changes.append(f"data.init_args.path={args.data}")
    if args.seeds is not None:
        changes.append(f"seeds={args.seeds}")
    return changes


def _parser(suites: Path) -> argparse.ArgumentParser:
    known = ", ".join(sorted(file.stem for file in suites.glob("*.yaml")))
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", required=True, help=f"a YAML file, or one of {known}")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("lightning_logs/compare"),
        help="folder for the suite's folder: report, figures and runs (default: lightning_logs/compare)",
    )
    parser.add_argument("--data", help="path of the suite's data; short for --set data.init_args.path=…")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds in place of the suite's")
    parser.add_argument("--rivals", nargs="+", metavar="NAME", help="only these rivals")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process (default: 1)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option over the suite's, such as training.trainer.max_steps=30; may be given several times",
    )
    parser.add_argument("--plan", action="store_true", help="only list the runs of the first stage")
    return parser
