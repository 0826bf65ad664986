"""What the local task files call to get their questions: files read and checked as in training."""

from typing import TYPE_CHECKING, Any

from moka_pl.data.formats.choice import check_choice, choice_features
from moka_pl.data.formats.mmlu import check_mmlu
from moka_pl.data.reading import read_rows

if TYPE_CHECKING:
    from datasets import Dataset


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
