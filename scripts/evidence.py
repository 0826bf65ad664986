#!/usr/bin/env python3
"""Trains SmolLM2-135M with several seeds and tests it on held-out tasks, before and after.

    python scripts/evidence.py commonsense --data FOLDER --out DIR
    python scripts/evidence.py instruction --data FILE --mmlu FOLDER --out DIR

`commonsense` trains the paper's form (ten components on q and v) on the train files of a folder of tasks and
tests on its test files. `instruction` trains on a file of instructions and tests on MMLU, five shots. Runs
that have ended are not run again. Prints Markdown and writes DIR/<study>.json. A GPU is advised.
"""

import argparse
import json
from pathlib import Path

from moka_pl.errors import MokaError
from moka_pl.evidence import Study, changes, markdown, run_study

_PAPER = {
    "model.adapter.components": "10",
    "model.adapter.target_modules": "[q_proj,v_proj]",
    "model.optimizer.init_args.lr": "4e-3",
}


def study_of(args: argparse.Namespace) -> Study:
    """The study that the arguments name."""
    data = {"data.init_args.path": str(args.data)}
    if args.study == "commonsense":
        train = data | _PAPER | {"data.init_args.validation_limit": "100"}
        return Study(args.study, "configs/smollm2_commonsense.yaml", train, data)
    test = {
        "data": "moka_pl.data.MmluData",
        "data.init_args.path": str(args.mmlu),
        "data.init_args.max_length": "2048",
        "data.init_args.batch_size": "16",
    }
    return Study(args.study, "configs/smollm2_instruction.yaml", data, test)


def main() -> None:
    """Runs a study and prints what it found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=("commonsense", "instruction"))
    parser.add_argument("--data", type=Path, required=True, help="training data")
    parser.add_argument("--mmlu", type=Path, help="folder of MMLU's dev and test files, for instruction")
    parser.add_argument("--out", type=Path, default=Path("lightning_logs/evidence"), help="runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    if args.study == "instruction" and args.mmlu is None:
        parser.error("instruction is tested on MMLU: give --mmlu FOLDER")
    try:
        results = run_study(study_of(args), args.out, args.seeds, args.jobs)
    except MokaError as error:
        parser.exit(2, f"evidence: error: {error}\n")
    file = args.out / f"{args.study}.json"
    file.write_text(json.dumps({"seeds": args.seeds, **results}, indent=1) + "\n", encoding="utf-8")
    where = "tasks" if args.study == "commonsense" else "groups"
    for score in ("acc_norm", "accuracy"):
        print(f"\n{score} in %\n\n{markdown(changes(results, score, where), len(args.seeds))}")
    for seed, losses in zip(args.seeds, results["losses"], strict=True):
        print(f"seed {seed}: held-out loss {' -> '.join(f'{loss:.4f}' for loss in losses)}")
    print(f"written: {file}")


if __name__ == "__main__":
    main()
