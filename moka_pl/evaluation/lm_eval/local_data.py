"""Tasks of lm_eval for a folder of local data, so that no hub is needed.

Known folders are those of ``CommonsenseData`` (a sub-folder with test.json for every task) and MMLU's (test/
and dev/ with a CSV file for every subject). A written task file names its task and its data, and includes one
of the package's in ``task_files/``. Its prompt is the one of the package's own evaluation, rendered with
lm_eval's placeholders; the questions are read and parsed as in training.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from moka_pl.data.encoding.report import ignored_fields, sum_ignored
from moka_pl.data.formats.choice import choice_features, parse_choice
from moka_pl.data.formats.mmlu import LETTERS, mmlu_groups, parse_mmlu
from moka_pl.data.reading import read_rows
from moka_pl.data.sources import Shard
from moka_pl.errors import DataError
from moka_pl.prompts.choice import CHOICE_PROMPTS, MMLU_PROMPTS, mmlu_header
from moka_pl.utils import expanded

if TYPE_CHECKING:
    from datasets import Dataset

TASK_FILES = Path(__file__).with_name("task_files")

cloze_options = CHOICE_PROMPTS["cloze"].bare_options
"""Named by ``cloze.yaml``: the number of options varies from question to question."""

_CHOICES = [f"{{{{choices[{number}]}}}}" for number in range(len(LETTERS))]


def local_tasks(folder: Path, num_fewshot: int | None = None) -> dict[str, dict[str, Any]]:
    """Returns the contents of a task file for every task in a folder, by task name.

    For MMLU these are also its categories, and ``mmlu`` over all. ``num_fewshot`` examples stand before every
    question; None takes each task's own number.

    Raises:
        DataError: The folder has another layout, or has no examples to put before the questions.
    """
    folder = expanded(folder).absolute()
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Give the folder that holds the tasks")
    subjects = [file.name.removesuffix("_test.csv") for file in sorted((folder / "test").glob("*_test.csv"))]
    if subjects:
        tasks = {f"mmlu_{subject}": _mmlu(folder, subject, num_fewshot) for subject in subjects}
        return tasks | _groups(list(tasks))
    folders = sorted(file.parent for file in folder.glob("*/test.json"))
    if not folders:
        raise DataError(
            f"{folder} has no tasks: it needs sub-folders with a test.json each, or test/*_test.csv as in "
            "MMLU. Give the folder above the tasks"
        )
    return {task.name: _cloze(task, num_fewshot) for task in folders}


def write_task_files(tasks: dict[str, dict[str, Any]], folder: Path) -> None:
    """Writes the tasks of ``local_tasks`` as files that lm_eval finds by ``include_path``."""
    for number, content in enumerate(tasks.values()):
        # JSON is YAML, and needs no thought about quoting.
        (folder / f"{number}.yaml").write_text(json.dumps(content), encoding="utf-8")


def _cloze(folder: Path, num_fewshot: int | None) -> dict[str, Any]:
    files = {"test": str(folder / "test.json")}
    content: dict[str, Any] = {
        "include": str(TASK_FILES / "cloze.yaml"),
        "task": folder.name,
        "doc_to_text": CHOICE_PROMPTS["cloze"].before({"question": "{{question}}"}),
    }
    if num_fewshot:
        files["train"] = str(folder / "train.json")
        if not (folder / "train.json").is_file():
            raise DataError(
                f"{folder} has no train.json for the {num_fewshot} few-shot examples. Add it, or omit "
                "--num_fewshot"
            )
        content["fewshot_split"] = "train"
    return content | {"dataset_kwargs": {"task": folder.name, "files": files}}


def _mmlu(folder: Path, subject: str, num_fewshot: int | None) -> dict[str, Any]:
    files = {"test": str(folder / "test" / f"{subject}_test.csv")}
    prompt, row = MMLU_PROMPTS["letters"], {"question": "{{question.strip()}}", "choices": _CHOICES}
    content: dict[str, Any] = {
        "include": str(TASK_FILES / "mmlu.yaml"),
        "task": f"mmlu_{subject}",
        "task_alias": subject,
        "description": f"{mmlu_header(subject)}\n\n",
        "doc_to_text": prompt.before(row),
        "doc_to_choice": prompt.bare_options(row),
    }
    shots = folder / "dev" / f"{subject}_dev.csv"
    if num_fewshot == 0:
        content |= {"fewshot_split": None, "fewshot_config": None}
    elif shots.is_file():
        files["dev"] = str(shots)
    else:
        raise DataError(
            f"{shots} is missing, the source of the few-shot examples. Add it, or set --num_fewshot 0"
        )
    return content | {"dataset_kwargs": {"task": subject, "files": files, "mmlu": True}}


def _groups(tasks: list[str]) -> dict[str, dict[str, Any]]:
    """Returns MMLU's categories, as far as they have subjects here, and ``mmlu`` over all."""
    groups = mmlu_groups(tasks)
    categorised = {task for members in groups.values() for task in members}
    groups["mmlu"] = [*groups, *(task for task in tasks if task not in categorised)]
    shared = {
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 1.0},
    }
    return {name: {"group": name, "task": members, **shared} for name, members in groups.items()}


def choice_splits(
    task: str, files: dict[str, str], mmlu: bool = False, **metadata: Any
) -> "dict[str, Dataset]":
    """Returns ``question``, ``choices`` and ``answer`` (an index) by split, read and parsed as in training.

    Args:
        task: The task's name, for records that do not name one, or the subject of MMLU.
        files: File of every split.
        mmlu: Whether the files are MMLU's.
        **metadata: What lm_eval adds for such functions; not needed.
    """
    parse, features = parse_mmlu if mmlu else parse_choice, choice_features()
    rows = {split: read_rows(Shard(file, context=task), parse, features) for split, file in files.items()}
    if ignored := sum_ignored(text for read in rows.values() for text in read["ignored"]):
        rank_zero_info(f"{task}: {ignored_fields(ignored)}")
    # lm_eval hashes whole records: a path in them would make the hash another on every machine.
    return {split: read.select_columns(["question", "choices", "answer"]) for split, read in rows.items()}
