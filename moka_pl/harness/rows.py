"""What the local task files call to get their questions: files read and checked as in training."""

from typing import TYPE_CHECKING, Any

from moka_pl.data.choice_rows import check_choice, choice_features
from moka_pl.data.errors import DataError
from moka_pl.data.reading import read_rows

if TYPE_CHECKING:
    from datasets import Dataset

_CHOICES = ("choice0", "choice1", "choice2", "choice3")


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


def check_mmlu(record: dict[str, Any], where: str, context: str) -> dict[str, Any]:
    """Check one record of an MMLU CSV file; `context` is the subject.

    Raises:
        DataError: A column is missing, or what it holds is of no use.
    """
    missing = [name for name in ("question", *_CHOICES, "answer") if name not in record]
    if missing:
        raise DataError(
            f"{where}: no column {', '.join(missing)}; found: {', '.join(map(str, record)) or 'nothing'}. "
            f"The header must be question,{','.join(_CHOICES)},answer."
        )
    answer = str(record["answer"]).strip()
    if answer not in {"0", "1", "2", "3"}:
        raise DataError(
            f"{where}: field 'answer' must be the index 0 to 3 of the right choice, found {answer!r}."
        )
    choices = [record[name] for name in _CHOICES]
    common = {
        "task": context,
        "question": record["question"],
        "choices": choices,
        "answer": int(answer),
    }
    return check_choice(common, where, context)


def _shown(rows: "Dataset") -> "Dataset":
    # lm_eval hashes whole records: a path in them would make the hash another on every machine.
    return rows.select_columns(["question", "choices", "answer"])
