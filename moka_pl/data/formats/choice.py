"""Check multiple-choice records: the common form, the LLM-Adapters form and the hub originals."""

import json
from typing import TYPE_CHECKING, Any

from moka_pl.data.choice_tasks import CHOICE_TASKS, fill_blank, normalise, task_name
from moka_pl.data.formats.hub_forms import hub_task, parse_hub
from moka_pl.data.formats.llm_adapters import LLM_ADAPTERS_FORM, parse_llm_adapters
from moka_pl.errors_part import DataError

if TYPE_CHECKING:
    from datasets import Features

FORMS = (
    f"Expected the common form (task, question, choices, answer), {LLM_ADAPTERS_FORM}, or the columns of "
    "a task's hub original"
)
CHOICE_FIELDS = ("task", "question", "choices", "answer", "instruction")
"""Fields of the common and the LLM-Adapters form; the option `columns` may map them."""


def choice_features() -> "Features":
    """Columns of a checked multiple-choice row; `answer` is the index of the right choice."""
    from datasets import Features, List, Value

    return Features(
        {
            "where": Value("string"),
            "task": Value("string"),
            "question": Value("large_string"),
            "choices": List(Value("large_string")),
            "answer": Value("int32"),
        }
    )


def check_choice(record: dict[str, Any], where: str, context: str) -> dict[str, Any]:
    """Check one multiple-choice record of any form.

    Args:
        record: The record as it was read. With the columns of a hub original it is one, with `instruction`
            and without `choices` it is in the LLM-Adapters form, else in the common form. In the common form
            `choices` may also be a JSON list and `answer` a number as text, as CSV files have them, and
            `answer` a capital letter.
        where: Its position, for messages.
        context: Name of the task of records that do not name one.

    Returns:
        A row with the columns of `choice_features`; items of the eight tasks are brought to one form
        (`choice_tasks.normalise`).

    Raises:
        DataError: A field is missing or of a wrong type, there are fewer than two choices, a choice is empty,
            or the answer is none of the choices.
    """
    task: object = record.get("task") or task_name(context)
    told = hub_task(record)
    kind: object = ""  # whose form the item gets; the user's own words stay as they are
    if told is not None:
        question, choices, answer = parse_hub(record, where, told)
        # The two parts of ARC have the same columns: there the context must say which one it is.
        task = task if told == "arc" or task in CHOICE_TASKS else told
        kind = told
    elif "choices" not in record and "instruction" in record:
        question, choices, answer = parse_llm_adapters(record, where)
        kind = task
    else:
        question, choices, answer = _common(record, where)
    if not isinstance(task, str) or not task:
        raise DataError(f"{where}: field 'task' must be a name, found {task!r}.")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: field 'question' must be text that is not empty, found {question!r}.")
    task = task_name(task)
    _check_choices(choices, where)
    if not 0 <= answer < len(choices):
        raise DataError(
            f"{where}: field 'answer' is {answer}, outside of the {len(choices)} choices "
            f"(0 to {len(choices) - 1}). Count from 0."
        )
    if kind:
        question, choices = normalise(task_name(str(kind)), question, choices)
        _check_choices(choices, where)
    return {"where": where, "task": task, "question": question, "choices": choices, "answer": answer}


def filled(row: dict[str, Any]) -> dict[str, Any]:
    """A checked row with the options in the blank of its sentence, where it is one of WinoGrande's."""
    if row["task"] != "winogrande":
        return row
    question, choices = fill_blank(row["question"], row["choices"])
    return row | {"question": question, "choices": choices}


def _common(record: dict[str, Any], where: str) -> tuple[Any, Any, int]:
    for field in ("question", "choices", "answer"):
        if field not in record:
            found = ", ".join(map(str, record)) or "nothing"
            raise DataError(f"{where}: field {field!r} is missing; found: {found}. {FORMS}.")
    choices = record["choices"]
    if isinstance(choices, str) and choices.lstrip().startswith("["):
        try:
            choices = json.loads(choices)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: field 'choices' is no JSON list ({error}), found {choices!r}."
            ) from error
    answer = record["answer"]
    if isinstance(answer, str) and answer.strip().isdecimal():
        answer = int(answer)
    elif isinstance(answer, str) and len(answer.strip()) == 1 and "A" <= answer.strip() <= "Z":
        answer = ord(answer.strip()) - ord("A")
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise DataError(
            f"{where}: field 'answer' must be the index of the right choice, counted from 0 (or its capital "
            f"letter), found {answer!r}."
        )
    return record["question"], choices, answer


def _check_choices(choices: object, where: str) -> None:
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: field 'choices' must be a list of texts, found {choices!r}.")
    if len(choices) < 2:
        raise DataError(f"{where}: {len(choices)} choice(s); a question needs at least two.")
    for index, choice in enumerate(choices):
        if not choice.strip():
            raise DataError(
                f"{where}: choice {index + 1} of {len(choices)} is empty. Fill it in or remove the row."
            )
