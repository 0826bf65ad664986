"""The common format of multiple-choice questions, and what every format of them gives."""

import json
from typing import Any, NamedTuple

from moka_pl.data.formats.base import Format, Record, brief, require
from moka_pl.errors import DataError

_FIELDS = ("question", "choices", "answer")


class Item(NamedTuple):
    """A multiple-choice question, not checked yet.

    Attributes:
        question: The question.
        choices: The options.
        answer: Index of the right option.
        task: The task that the record's columns tell.
        published: Whether it is worded as a published corpus words the task: ``normalise`` brings such items
            to one wording. The user's own words stay as they are.
    """

    question: Any
    choices: Any
    answer: int
    task: str | None = None
    published: bool = False


def _parse(record: Record) -> Item:
    question, choices, answer = (require(record, field) for field in _FIELDS)
    if isinstance(choices, str) and choices.lstrip().startswith("["):
        try:
            choices = json.loads(choices)
        except json.JSONDecodeError as error:
            raise DataError(f"field 'choices' is no JSON list ({error}), found {brief(choices)}") from error
    if isinstance(answer, str) and answer.strip().isdecimal():
        answer = int(answer)
    elif isinstance(answer, str) and len(answer.strip()) == 1 and "A" <= answer.strip() <= "Z":
        answer = ord(answer.strip()) - ord("A")
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise DataError(
            "field 'answer' must be the index of the right choice, counted from 0 (or its capital letter), "
            f"found {brief(answer)}"
        )
    return Item(question, choices, answer)


COMMON = Format(
    "the common format (task, question, choices, answer)",
    ("task", *_FIELDS),
    lambda record: any(field in record for field in _FIELDS),
    _parse,
)
