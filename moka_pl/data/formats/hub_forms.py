"""The eight commonsense tasks in the columns of their hub originals."""

from collections.abc import Callable, Mapping
from typing import Any

from moka_pl.errors_part import DataError

Item = tuple[str, list[Any], int]
"""Question, options and the index of the right one."""


def hub_task(record: Mapping[str, Any]) -> str | None:
    """The task whose columns a record has; ARC's two parts cannot be told apart and give `"arc"`."""
    return next((task for task, (columns, _) in _FORMS.items() if all(c in record for c in columns)), None)


def parse_hub(record: Mapping[str, Any], where: str, task: str) -> Item:
    """Take a record of a hub original apart.

    Args:
        record: As it was read; CSV files may hold numbers and truth values as text.
        where: Its position, for messages.
        task: What `hub_task` said.

    Returns:
        Question, options and the index of the right one, not normalised yet.

    Raises:
        DataError: A column has a wrong type, or the label is none of the options.
    """
    columns, parse = _FORMS[task]
    for column in columns:
        if record[column] is None:
            raise DataError(f"{where}: field {column!r} of {task} is empty.")
    return parse(record, where)


def _boolq(record: Mapping[str, Any], where: str) -> Item:
    answer = record["answer"]
    if isinstance(answer, str) and answer.strip().lower() in ("true", "false"):
        answer = answer.strip().lower() == "true"
    if not isinstance(answer, bool):
        raise DataError(f"{where}: field 'answer' of boolq must be true or false, found {answer!r}.")
    return _text(record, "question", where), ["true", "false"], 0 if answer else 1


def _piqa(record: Mapping[str, Any], where: str) -> Item:
    options = [record["sol1"], record["sol2"]]
    return _text(record, "goal", where), options, _label(record, "label", ("0", "1"), where)


def _siqa(record: Mapping[str, Any], where: str) -> Item:
    question = f"{_text(record, 'context', where).strip()} {_text(record, 'question', where).strip()}"
    options = [record[f"answer{letter}"] for letter in "ABC"]
    return question, options, _label(record, "label", ("1", "2", "3"), where)


def _hellaswag(record: Mapping[str, Any], where: str) -> Item:
    question = f"{_text(record, 'activity_label', where)}: {_text(record, 'ctx', where)}"
    endings = record["endings"]
    if not isinstance(endings, list):
        raise DataError(f"{where}: field 'endings' must be a list of texts, found {endings!r}.")
    return question, endings, _label(record, "label", tuple(map(str, range(len(endings)))), where)


def _winogrande(record: Mapping[str, Any], where: str) -> Item:
    options = [record["option1"], record["option2"]]
    sentence = _text(record, "sentence", where)
    if "_" not in sentence:
        raise DataError(f"{where}: field 'sentence' has no blank '_' to fill in, found {sentence!r}.")
    return sentence, options, _label(record, "answer", ("1", "2"), where)


def _arc(record: Mapping[str, Any], where: str) -> Item:
    return _keyed(record, "question", where)


def _openbookqa(record: Mapping[str, Any], where: str) -> Item:
    return _keyed(record, "question_stem", where)


def _keyed(record: Mapping[str, Any], question: str, where: str) -> Item:
    """Options with letters or numbers of their own, which `answerKey` names."""
    choices = record["choices"]
    if isinstance(choices, list) and all(isinstance(choice, Mapping) for choice in choices):
        # The original files hold a list of objects.
        choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
    texts = choices.get("text") if isinstance(choices, Mapping) else None
    labels = choices.get("label") if isinstance(choices, Mapping) else None
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        raise DataError(
            f"{where}: field 'choices' must hold 'text' and 'label', two lists of equal length, found "
            f"{record['choices']!r}."
        )
    known = tuple(map(str, labels))
    return _text(record, question, where), texts, _label(record, "answerKey", known, where)


def _text(record: Mapping[str, Any], column: str, where: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise DataError(f"{where}: field {column!r} must be text, found {value!r}.")
    return value


def _label(record: Mapping[str, Any], column: str, labels: tuple[str, ...], where: str) -> int:
    value = record[column]
    text = str(value).strip()
    if isinstance(value, bool) or text not in labels:
        hint = " Sets without labels cannot be used: take the validation split." if value in ("", -1) else ""
        raise DataError(
            f"{where}: field {column!r} is {value!r}, outside of the options {', '.join(labels)}.{hint}"
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
