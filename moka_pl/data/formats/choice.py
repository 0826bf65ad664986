"""Check multiple-choice records: the common form, the LLM-Adapters form and the hub originals."""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moka_pl.data.catalog import CHOICE_TASKS, fill_blank, normalise, task_name
from moka_pl.data.formats.llm_adapters import LLM_ADAPTERS_FORM, parse_llm_adapters
from moka_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Features


# The eight commonsense tasks in the columns of their hub originals.


Item = tuple[str, list[Any], int]
"""Question, options and the index of the right one."""


def hub_task(record: Mapping[str, Any]) -> str | None:
    """The task whose columns a record has; ARC's two parts cannot be told apart and give `"arc"`."""
    return next((task for task, (columns, _) in _FORMS.items() if all(c in record for c in columns)), None)


def parse_hub(record: Mapping[str, Any], location: str, task: str) -> Item:
    """Take a record of a hub original apart.

    Args:
        record: As it was read; CSV files may hold numbers and truth values as text.
        location: Its position, for messages.
        task: What `hub_task` said.

    Returns:
        Question, options and the index of the right one, not normalised yet.

    Raises:
        DataError: A column has a wrong type, or the label is none of the options.
    """
    columns, parse = _FORMS[task]
    for column in columns:
        if record[column] is None:
            raise DataError(f"{location}: field {column!r} of {task} is empty.")
    return parse(record, location)


def _boolq(record: Mapping[str, Any], location: str) -> Item:
    answer = record["answer"]
    if isinstance(answer, str) and answer.strip().lower() in ("true", "false"):
        answer = answer.strip().lower() == "true"
    if not isinstance(answer, bool):
        raise DataError(f"{location}: field 'answer' of boolq must be true or false, found {answer!r}.")
    return _text(record, "question", location), ["true", "false"], 0 if answer else 1


def _piqa(record: Mapping[str, Any], location: str) -> Item:
    options = [record["sol1"], record["sol2"]]
    return _text(record, "goal", location), options, _label(record, "label", ("0", "1"), location)


def _siqa(record: Mapping[str, Any], location: str) -> Item:
    question = f"{_text(record, 'context', location).strip()} {_text(record, 'question', location).strip()}"
    options = [record[f"answer{letter}"] for letter in "ABC"]
    return question, options, _label(record, "label", ("1", "2", "3"), location)


def _hellaswag(record: Mapping[str, Any], location: str) -> Item:
    question = f"{_text(record, 'activity_label', location)}: {_text(record, 'ctx', location)}"
    endings = record["endings"]
    if not isinstance(endings, list):
        raise DataError(f"{location}: field 'endings' must be a list of texts, found {endings!r}.")
    return question, endings, _label(record, "label", tuple(map(str, range(len(endings)))), location)


def _winogrande(record: Mapping[str, Any], location: str) -> Item:
    options = [record["option1"], record["option2"]]
    sentence = _text(record, "sentence", location)
    if "_" not in sentence:
        raise DataError(f"{location}: field 'sentence' has no blank '_' to fill in, found {sentence!r}.")
    return sentence, options, _label(record, "answer", ("1", "2"), location)


def _arc(record: Mapping[str, Any], location: str) -> Item:
    return _keyed(record, "question", location)


def _openbookqa(record: Mapping[str, Any], location: str) -> Item:
    return _keyed(record, "question_stem", location)


def _keyed(record: Mapping[str, Any], question: str, location: str) -> Item:
    """Options with letters or numbers of their own, which `answerKey` names."""
    choices = record["choices"]
    if isinstance(choices, list) and all(isinstance(choice, Mapping) for choice in choices):
        # The original files hold a list of objects.
        choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
    texts = choices.get("text") if isinstance(choices, Mapping) else None
    labels = choices.get("label") if isinstance(choices, Mapping) else None
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        raise DataError(
            f"{location}: field 'choices' must hold 'text' and 'label', two lists of equal length, found "
            f"{record['choices']!r}."
        )
    known = tuple(map(str, labels))
    return _text(record, question, location), texts, _label(record, "answerKey", known, location)


def _text(record: Mapping[str, Any], column: str, location: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise DataError(f"{location}: field {column!r} must be text, found {value!r}.")
    return value


def _label(record: Mapping[str, Any], column: str, labels: tuple[str, ...], location: str) -> int:
    value = record[column]
    text = str(value).strip()
    if isinstance(value, bool) or text not in labels:
        hint = " Sets without labels cannot be used: take the validation split." if value in ("", -1) else ""
        raise DataError(
            f"{location}: field {column!r} is {value!r}, outside of the options {', '.join(labels)}.{hint}"
        )
    return labels.index(text)


_FORMS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any], str], Item]]] = {
    "piqa": (("goal", "sol1", "sol2", "label"), _piqa),
    "siqa": (("context", "question", "answerA", "answerB", "answerC", "label"), _siqa),
    "hellaswag": (("activity_label", "ctx", "endings", "label"), _hellaswag),
    "winogrande": (("sentence", "option1", "option2", "answer"), _winogrande),
    "openbookqa": (("question_stem", "choices", "answerKey"), _openbookqa),
    "arc": (("question", "choices", "answerKey"), _arc),
    "boolq": (("question", "answer", "passage"), _boolq),
}


# Check multiple-choice records: the common form, the LLM-Adapters form and the hub originals.


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
            "location": Value("string"),
            "task": Value("string"),
            "question": Value("large_string"),
            "choices": List(Value("large_string")),
            "answer": Value("int32"),
        }
    )


def parse_choice(record: dict[str, Any], location: str, context: str) -> dict[str, Any]:
    """Check one multiple-choice record of any form.

    Args:
        record: The record as it was read. With the columns of a hub original it is one, with `instruction`
            and without `choices` it is in the LLM-Adapters form, else in the common form. In the common form
            `choices` may also be a JSON list and `answer` a number as text, as CSV files have them, and
            `answer` a capital letter.
        location: Its position, for messages.
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
        question, choices, answer = parse_hub(record, location, told)
        # The two parts of ARC have the same columns: there the context must say which one it is.
        task = task if told == "arc" or task in CHOICE_TASKS else told
        kind = told
    elif "choices" not in record and "instruction" in record:
        question, choices, answer = parse_llm_adapters(record, location)
        kind = task
    else:
        question, choices, answer = _common(record, location)
    if not isinstance(task, str) or not task:
        raise DataError(f"{location}: field 'task' must be a name, found {task!r}.")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{location}: field 'question' must be text that is not empty, found {question!r}.")
    task = task_name(task)
    _check_choices(choices, location)
    if not 0 <= answer < len(choices):
        raise DataError(
            f"{location}: field 'answer' is {answer}, outside of the {len(choices)} choices "
            f"(0 to {len(choices) - 1}). Count from 0."
        )
    if kind:
        question, choices = normalise(task_name(str(kind)), question, choices)
        _check_choices(choices, location)
    return {"location": location, "task": task, "question": question, "choices": choices, "answer": answer}


def filled(row: dict[str, Any]) -> dict[str, Any]:
    """A checked row with the options in the blank of its sentence, where it is one of WinoGrande's."""
    if row["task"] != "winogrande":
        return row
    question, choices = fill_blank(row["question"], row["choices"])
    return row | {"question": question, "choices": choices}


def _common(record: dict[str, Any], location: str) -> tuple[Any, Any, int]:
    for field in ("question", "choices", "answer"):
        if field not in record:
            found = ", ".join(map(str, record)) or "nothing"
            raise DataError(f"{location}: field {field!r} is missing; found: {found}. {FORMS}.")
    choices = record["choices"]
    if isinstance(choices, str) and choices.lstrip().startswith("["):
        try:
            choices = json.loads(choices)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{location}: field 'choices' is no JSON list ({error}), found {choices!r}."
            ) from error
    answer = record["answer"]
    if isinstance(answer, str) and answer.strip().isdecimal():
        answer = int(answer)
    elif isinstance(answer, str) and len(answer.strip()) == 1 and "A" <= answer.strip() <= "Z":
        answer = ord(answer.strip()) - ord("A")
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise DataError(
            f"{location}: field 'answer' must be the index of the right choice, counted from 0 (or its "
            f"capital letter), found {answer!r}."
        )
    return record["question"], choices, answer


def _check_choices(choices: object, location: str) -> None:
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{location}: field 'choices' must be a list of texts, found {choices!r}.")
    if len(choices) < 2:
        raise DataError(f"{location}: {len(choices)} choice(s); a question needs at least two.")
    for index, choice in enumerate(choices):
        if not choice.strip():
            raise DataError(
                f"{location}: choice {index + 1} of {len(choices)} is empty. Fill it in or remove the row."
            )
