"""Rows of multiple-choice questions; which format a record has is told by its columns."""

from typing import TYPE_CHECKING, Any

from moka_pl.data.catalog import CHOICE_TASKS, fill_blank, normalise, task_name
from moka_pl.data.formats.base import Record, brief, parse_as
from moka_pl.data.formats.hub_tasks import ARC
from moka_pl.data.formats.registry import CHOICE_FORMATS
from moka_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Features

CHOICE_FIELDS = tuple(dict.fromkeys(field for format in CHOICE_FORMATS for field in format.fields))
"""Fields of the formats; the option ``columns`` may map them."""


def choice_features() -> "Features":
    """Returns the columns of a multiple-choice row; ``answer`` is the index of the right choice."""
    from datasets import Features, List, Value

    return Features(
        {
            "location": Value("string"),
            "task": Value("string"),
            "question": Value("large_string"),
            "choices": List(Value("large_string")),
            "answer": Value("int32"),
        }
    )


def parse_choice(record: Record, context: str = "") -> dict[str, Any]:
    """Parses one multiple-choice record of any format to ``choice_features``, without the location.

    In the common format ``choices`` may also be a JSON list and ``answer`` a number as text, as CSV files
    have them, and ``answer`` a capital letter. Items of the eight tasks are brought to one wording
    (``catalog.normalise``). ``context`` names the task of records that do not name one.

    Raises:
        DataError: A field is missing or of a wrong type, or the answer is none of two or more choices.
    """
    question, choices, answer, told, published = parse_as(CHOICE_FORMATS, record)
    task: object = record.get("task") or task_name(context)
    # The two parts of ARC have the same columns: there the context must say which one it is.
    if told not in (None, ARC) and task not in CHOICE_TASKS:
        task = told
    if not isinstance(task, str) or not task:
        raise DataError(f"field 'task' must be a name, found {brief(task)}")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"field 'question' must be text that is not empty, found {brief(question)}")
    _check_choices(choices)
    if not 0 <= answer < len(choices):
        raise DataError(
            f"field 'answer' is {brief(answer)}, outside of the {len(choices)} choices (0 to "
            f"{len(choices) - 1}). Count from 0"
        )
    if published:
        question, choices = normalise(told or task_name(task), question, choices)
        _check_choices(choices)
    return {"task": task_name(task), "question": question, "choices": choices, "answer": answer}


def with_filled_blank(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row with the options in the blank of its sentence, if it is one of WinoGrande's."""
    if row["task"] != "winogrande":
        return row
    question, choices = fill_blank(row["question"], row["choices"])
    return row | {"question": question, "choices": choices}


def _check_choices(choices: object) -> None:
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"field 'choices' must be a list of texts, found {brief(choices)}")
    if len(choices) < 2:
        raise DataError(f"{len(choices)} choice(s); a question needs at least two")
    for index, choice in enumerate(choices, start=1):
        if not choice.strip():
            raise DataError(f"choice {index} of {len(choices)} is empty. Fill it in or remove the row")
