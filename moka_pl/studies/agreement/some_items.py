"""Copies of local data with some questions of every task only, so that two evaluations read the same."""

import csv
import json
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from moka_pl.data.readers import stream
from moka_pl.errors_part import DataError


def copy_questions(source: Path, tasks: Sequence[str], chosen: range, target: Path) -> Path:
    """Copies a part of test.json of some tasks.

    Args:
        source: A folder with a sub-folder for every task.
        tasks: Names of the tasks.
        chosen: Which questions of every task, counted from 0; those that are not there are left out.
        target: The folder to make.

    Returns:
        ``target``.

    Raises:
        DataError: If a task is missing, its file cannot be read, or it has none of the questions.
    """
    for task in tasks:
        records = _records(source / task / "test.json", chosen)
        (target / task).mkdir(parents=True)
        (target / task / "test.json").write_text(json.dumps(records), encoding="utf-8")
    return target


def copy_mmlu_questions(source: Path, subjects: Sequence[str], chosen: range, target: Path) -> Path:
    """Copies a part of the test files of some MMLU subjects, and their worked examples.

    Args:
        source: A folder with dev/ and test/.
        subjects: Names of the subjects.
        chosen: Which questions of every subject, counted from 0; those that are not there are left out.
        target: The folder to make.

    Returns:
        ``target``.

    Raises:
        DataError: If a file is missing or cannot be read, or has none of the questions.
    """
    for part in ("dev", "test"):
        (target / part).mkdir(parents=True)
    for subject in subjects:
        shots = Path("dev", f"{subject}_dev.csv")
        if not (source / shots).is_file():
            raise DataError(f"{source / shots} does not exist. Correct the subject, or give MMLU's folder.")
        shutil.copyfile(source / shots, target / shots)
        questions = Path("test", f"{subject}_test.csv")
        records = _records(source / questions, chosen)
        with (target / questions).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    return target


def _records(file: Path, chosen: range) -> list[dict[str, Any]]:
    records = [record for _, record in islice(stream(file), chosen.start, chosen.stop)]
    if not records:
        raise DataError(f"{file} has no questions from number {chosen.start} on; take fewer off.")
    return records
