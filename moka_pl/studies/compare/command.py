"""The command behind ``scripts/compare.py``: trains what a suite compares, and reports."""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moka_pl.errors import INTERRUPTED, MokaError, end_interrupted
from moka_pl.studies.common import Parser, one_line_errors, write_json
from moka_pl.studies.compare.suite import DATA, Suite, find_suite, keep_methods, names_data, read_suite
from moka_pl.utils import make_folder

DESCRIPTION = """\
Trains every method of a suite with every learning rate on the same batches, picks each method's rate on
held-out data, tests the picked rate with all seeds, and compares the methods on the same test items.

Finished runs are kept and never repeated, even after an interruption or a change of the suite. Failed runs
are retried. Suites under the same --out share runs. Data files are identified by name: use another --out if
their content changes.
"""

#: Seconds that the reports of the suites may take, and those that every suite adds.
_REPORTS = (10.0, 6.0)
_SUITE = "suite.json"


@one_line_errors("compare")
def main(suites: Path, arguments: Sequence[str] | None = None) -> None:
    """Parses the options, runs the suites and prints their tables.

    Args:
        suites: Folder of the suites that are known by name.
        arguments: Default: the process's.
    """
    parser = _parser(suites)
    args = parser.parse_args(arguments)
    try:
        if args.jobs < 1:
            raise MokaError(f"--jobs must be at least 1, not {args.jobs}")
        if args.minutes is not None and args.minutes <= 0:
            raise MokaError(f"--minutes must be above 0, not {args.minutes:g}")
        if args.report:
            if args.results is not None:
                make_folder(args.results, "--results")
            elif args.methods is not None:
                raise MokaError("--report --methods would replace the reports of all methods; set --results")
            suites_run = _stored(args)
            _check_reports(suites_run, args)
            _report(suites_run if args.methods is None else keep_methods(suites_run, args.methods), args)
        elif not args.suite:
            raise MokaError("no suite given; set --suite")
        else:
            _run(_read(suites, args), args)
    except KeyboardInterrupt:  # before anything was done, or a second one while the report is written
        end_interrupted()


def _run(suites: list[Suite], args: argparse.Namespace) -> None:
    from moka_pl.studies.compare.build import check_methods, check_suite
    from moka_pl.studies.compare.drive import run_suites
    from moka_pl.studies.compare.runs import Store
    from moka_pl.studies.compare.schedule import Clock
    from moka_pl.studies.compare.train import prepare_data

    clock = Clock(args.minutes, _REPORTS[0] + _REPORTS[1] * len(suites))
    whole = suites
    if args.methods is not None:
        suites = keep_methods(suites, args.methods)
    for suite in suites:
        _check_data(suite)
        check_suite(suite)
        if args.jobs > 1 and suite.data.get("init_args", {}).get("num_workers"):
            raise MokaError(
                f"{suite.name}: --jobs does not work with dataloader workers; set "
                "data.init_args.num_workers to 0"
            )
    store = Store(args.out)
    if args.plan:
        _plan(suites, store)
        return
    devices = _devices(args.devices)
    make_folder(args.out, "--out")
    if args.results is not None:
        make_folder(args.results, "--results")
    _check_reports(suites, args)
    _interrupt_on_sigterm()

    def begin() -> None:
        for suite in suites:
            check_methods(suite)
        prepare_data(suites)  # tokenised once for all processes; what is wrong with them shows here
        for suite in whole:  # later reports are of all methods
            write_json(args.out / suite.name / _SUITE, asdict(suite), 1)

    try:
        run_suites(suites, store, args.jobs, devices, clock, begin)
    except KeyboardInterrupt:
        told = f"finished runs are kept in {args.out}; run the same command again to continue"
        print(f"\ninterrupted; {told}", file=sys.stderr)
        _report(suites, args)
        sys.exit(INTERRUPTED)
    if not _report(suites, args):
        sys.exit(1)
    print(f"curves: tensorboard --logdir {store.folder}")


def _check_reports(suites: Sequence[Suite], args: argparse.Namespace) -> None:
    from moka_pl.studies.compare.write import check_reports

    check_reports(suites, args.results or args.out, "--out" if args.results is None else "--results")


def _report(suites: Sequence[Suite], args: argparse.Namespace) -> bool:
    """Writes the reports and prints their tables; returns whether there is any result."""
    from moka_pl.studies.compare.across.write import write_across
    from moka_pl.studies.compare.report import collect, make_report
    from moka_pl.studies.compare.runs import Store
    from moka_pl.studies.compare.tables import markdown
    from moka_pl.studies.compare.write import write_report

    store, target = Store(args.out), args.results or args.out
    reports, files = [], []
    for suite in suites:
        reports.append(make_report(suite, collect(suite, store)))
        files += write_report(reports[-1], target / suite.name)
        print(f"\n{markdown(reports[-1])}", flush=True)
    files += write_across(reports, target)
    print("written: " + " ".join(str(file) for file in files))
    return any(row.parameters for report in reports for row in report.rows)


def _plan(suites: Sequence[Suite], store: Any) -> None:
    from moka_pl.studies.compare.schedule import Plan

    remaining = Plan(suites, store).remaining()
    if not remaining.tasks:
        print("everything is done")
        return
    for task in remaining.tasks:
        print(f"to do  {task.run}{': train and test' if task.test and task.run.rate is not None else ''}")
    print(f"then {len(remaining.later)} runs with the picked learning rates and their tests")
    if widened := [
        f"{suite.widen} more learning rates a method of {suite.name}" for suite in suites if suite.widen
    ]:
        print("and up to", ", ".join(widened))


def _read(folder: Path, args: argparse.Namespace) -> list[Suite]:
    changes = list(args.set)
    if args.seeds is not None:
        changes.append(f"seeds={args.seeds}")
    suites = []
    for name in args.suite:
        try:
            file = find_suite(name, folder)
        except MokaError as error:
            raise MokaError(f"--suite {error}") from None
        suites.append(read_suite(file, changes, args.data, folder))
    names = [suite.name for suite in suites]
    if len(set(names)) < len(names):
        raise MokaError(f"--suite names a suite twice: {', '.join(names)}")
    return suites


def _check_data(suite: Suite) -> None:
    bases = [suite.backbone, *(method.backbone for method in suite.methods)]
    if names_data([suite.data, suite.test, suite.forgetting, *bases]):
        raise MokaError(f"suite {suite.name} needs data; set --data to the folder that it calls {DATA}")


def _stored(args: argparse.Namespace) -> list[Suite]:
    """The suites as they were when they were last run under --out."""
    files = sorted(args.out.glob(f"*/{_SUITE}"))
    if args.suite:
        files = [args.out / name / _SUITE for name in args.suite]
    if not files:
        raise MokaError(f"--report: {args.out} has no suite that was run")
    suites = []
    for file in files:
        try:
            suites.append(Suite.from_dict(json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MokaError(f"--report: {file} cannot be read: {error}") from error
    return suites


def _devices(written: str | None) -> list[int] | None:
    """``2`` means two GPUs, ``0,2`` these ones."""
    if written is None:
        return None
    import torch

    try:
        numbers = [int(number) for number in written.split(",") if number.strip()]
    except ValueError:
        numbers = []
    devices = list(range(numbers[0])) if len(numbers) == 1 and "," not in written else numbers
    if not devices or min(devices) < 0:
        raise MokaError(f"--devices {written}: give a number of GPUs, or their indices, such as 0,2")
    count = torch.cuda.device_count()
    if max(devices) >= count:
        raise MokaError(f"--devices {written}: only {count} GPUs are available")
    return devices


def _interrupt_on_sigterm() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _parser(suites: Path) -> Parser:
    known = ", ".join(sorted(file.stem for file in suites.glob("*.yaml")))
    parser = Parser("compare", DESCRIPTION)
    parser.add_argument(
        "--suite",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"YAML files, or names out of {known}; the most important first",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("lightning_logs/compare"),
        help="folder for runs, and for a folder of reports per suite (default: lightning_logs/compare)",
    )
    parser.add_argument(
        "--data",
        help="path of the data, or of a folder with the suites' corpora, such as commonsense and "
        "instruction/alpaca_en_demo.json",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds, instead of the suites'")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods; with --report, too")
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, one process each (default: 1)")
    parser.add_argument(
        "--devices", help="GPUs to spread the processes over: their count, or their indices, such as 0,2"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="time limit in minutes, reports included; runs that would exceed it do not start",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override an option of the suites, such as training.trainer.max_steps=30; repeatable",
    )
    parser.add_argument("--plan", action="store_true", help="only list the remaining runs")
    parser.add_argument(
        "--report",
        action="store_true",
        help="only write reports of the suites last run under --out; their data are not needed",
    )
    parser.add_argument("--results", type=Path, help="folder for the reports, instead of --out")
    return parser
