"""Task files of lm_eval for a folder of local data, so that no hub is needed.

A file names its task and data and includes one of the package's own in ``tasks/``. Known folders are those of
:class:`~moka_pl.data.CommonsenseData` (a sub-folder with test.json for every task) and MMLU's (test/ and dev/
with a CSV file for every subject).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.data.formats.choice import check_choice, choice_features
from moka_pl.data.formats.mmlu import CATEGORIES, check_mmlu
from moka_pl.data.reading import read_rows
from moka_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


_TEMPLATES = Path(__file__).with_name("tasks")
_MMLU = "mmlu"


def local_tasks(folder: Path, num_fewshot: int | None = None) -> dict[str, dict[str, Any]]:
    """What lm_eval needs to know of every task in a folder.

    Args:
        folder: A folder of a known form.
        num_fewshot: Worked examples before every question; None takes each task's own number.

    Returns:
        The contents of a task file by task name; for MMLU also its categories, and ``mmlu`` over all.

    Raises:
        DataError: The folder has another form, or has no examples to put before the questions.
    """
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Give the folder that holds the tasks.")
    subjects = sorted((folder / "test").glob("*_test.csv"))
    if subjects:
        return _mmlu(folder, [file.name.removesuffix("_test.csv") for file in subjects], num_fewshot)
    tasks = sorted(file.parent for file in folder.glob("*/test.json"))
    if not tasks:
        raise DataError(
            f"{folder} holds no tasks: neither sub-folders with a test.json each, nor test/*_test.csv as in "
            "MMLU. Give the folder above the tasks."
        )
    return {task.name: _cloze(task, num_fewshot) for task in tasks}


def write_task_files(tasks: dict[str, dict[str, Any]], folder: Path) -> None:
    """Writes a task file for each task, which lm_eval finds by ``include_path``.

    Args:
        tasks: From :func:`local_tasks`.
        folder: Where to write them.
    """
    for number, content in enumerate(tasks.values()):
        # JSON is YAML, and needs no thought about quoting.
        (folder / f"{number}.yaml").write_text(json.dumps(content), encoding="utf-8")


def _cloze(folder: Path, num_fewshot: int | None) -> dict[str, Any]:
    files = {"test": str(folder / "test.json")}
    content: dict[str, Any] = {"include": str(_TEMPLATES / "cloze.yaml"), "task": folder.name}
    if num_fewshot:
        files["train"] = str(folder / "train.json")
        if not (folder / "train.json").is_file():
            raise DataError(
                f"{folder} has no train.json to take {num_fewshot} worked examples from. Add it, or leave "
                "num_fewshot out."
            )
        content["fewshot_split"] = "train"
    return content | {"dataset_kwargs": {"task": folder.name, "files": files}}


def _mmlu(folder: Path, subjects: list[str], num_fewshot: int | None) -> dict[str, dict[str, Any]]:
    tasks: dict[str, dict[str, Any]] = {}
    for subject in subjects:
        name = f"{_MMLU}_{subject}"
        files = {"test": str(folder / "test" / f"{subject}_test.csv")}
        content: dict[str, Any] = {
            "include": str(_TEMPLATES / "mmlu.yaml"),
            "task": name,
            "task_alias": subject,
            "description": "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n",
        }
        shots = folder / "dev" / f"{subject}_dev.csv"
        if num_fewshot == 0:
            content |= {"fewshot_split": None, "fewshot_config": None}
        elif shots.is_file():
            files["dev"] = str(shots)
        else:
            raise DataError(
                f"{shots} is missing: the worked examples come from it. Add it, or set num_fewshot to 0."
            )
        tasks[name] = content | {"dataset_kwargs": {"task": subject, "files": files}}
    return tasks | _groups(list(tasks))


def _groups(tasks: list[str]) -> dict[str, dict[str, Any]]:
    """MMLU's categories, as far as they have subjects here, and ``mmlu`` over all."""
    parts = {
        f"{_MMLU}_{category}": [f"{_MMLU}_{subject}" for subject in subjects if f"{_MMLU}_{subject}" in tasks]
        for category, subjects in CATEGORIES.items()
    }
    parts = {name: members for name, members in parts.items() if members}
    grouped = {task for members in parts.values() for task in members}
    parts[_MMLU] = [*parts, *(task for task in tasks if task not in grouped)]
    mean = {"metric": "acc", "weight_by_size": True}
    shared = {"aggregate_metric_list": [mean], "metadata": {"version": 1.0}}
    return {name: {"group": name, "task": members, **shared} for name, members in parts.items()}


# What the local task files call to get their questions: files read and checked as in training.


def cloze_splits(task: str, files: dict[str, str], **metadata: Any) -> "dict[str, Dataset]":
    """The splits of a multiple-choice task.

    Args:
        task: The task's name, for records that do not name one.
        files: File of every split, in the common form or the LLM-Adapters form.
        **metadata: What lm_eval adds for such functions; not needed.

    Returns:
        `question`, `choices` and `answer` (an index) by split.

    Raises:
        DataError: A file cannot be used.
    """
    features = choice_features()
    return {
        split: _shown(read_rows(file, check_choice, features, context=task)) for split, file in files.items()
    }


def mmlu_splits(task: str, files: dict[str, str], **metadata: Any) -> "dict[str, Dataset]":
    """The splits of an MMLU subject from CSV files with the columns question, choice0 … choice3, answer.

    Args:
        task: The subject.
        files: File of every split.
        **metadata: What lm_eval adds for such functions; not needed.

    Returns:
        As `cloze_splits`.

    Raises:
        DataError: A file cannot be used.
    """
    features = choice_features()
    return {
        split: _shown(read_rows(file, check_mmlu, features, context=task)) for split, file in files.items()
    }


def _shown(rows: "Dataset") -> "Dataset":
    # lm_eval hashes whole records: a path in them would make the hash another on every machine.
    return rows.select_columns(["question", "choices", "answer"])
