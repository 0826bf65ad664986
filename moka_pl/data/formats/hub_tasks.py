"""The eight commonsense tasks in the columns of their hub originals."""

from collections.abc import Callable, Mapping
from functools import partial

from moka_pl.data.formats.base import Format, Record, brief, require_text
from moka_pl.data.formats.common import Item
from moka_pl.errors import DataError

ARC = "arc"
"""Name of ARC's two tasks while only their (identical) columns are known."""


def hub_task(record: Record) -> str | None:
    """Returns the task whose columns a record has, ``ARC`` for both parts of ARC; None for other records."""
    return next((task for task, (columns, _) in _TASKS.items() if all(c in record for c in columns)), None)


def _parse(record: Record) -> Item:
    task = hub_task(record)
    assert task is not None
    columns, parse = _TASKS[task]
    for column in columns:
        if record[column] is None:
            raise DataError(f"field {column!r} of {task} is empty")
    return parse(record)._replace(task=task, published=True)


def _boolq(record: Record) -> Item:
    answer = record["answer"]
    if isinstance(answer, str) and answer.strip().lower() in ("true", "false"):  # as CSV files hold them
        answer = answer.strip().lower() == "true"
    if not isinstance(answer, bool):
        raise DataError(f"field 'answer' of boolq must be true or false, found {brief(answer)}")
    return Item(require_text(record, "question"), ["true", "false"], 0 if answer else 1)


def _piqa(record: Record) -> Item:
    return Item(
        require_text(record, "goal"), [record["sol1"], record["sol2"]], _label(record, "label", ("0", "1"))
    )


def _siqa(record: Record) -> Item:
    question = f"{require_text(record, 'context').strip()} {require_text(record, 'question').strip()}"
    options = [record[f"answer{letter}"] for letter in "ABC"]
    return Item(question, options, _label(record, "label", ("1", "2", "3")))


def _hellaswag(record: Record) -> Item:
    question = f"{require_text(record, 'activity_label')}: {require_text(record, 'ctx')}"
    endings = record["endings"]
    if not isinstance(endings, list):
        raise DataError(f"field 'endings' must be a list of texts, found {brief(endings)}")
    return Item(question, endings, _label(record, "label", tuple(map(str, range(len(endings))))))


def _winogrande(record: Record) -> Item:
    sentence = require_text(record, "sentence")
    if "_" not in sentence:
        raise DataError(f"field 'sentence' has no blank '_' to fill in, found {brief(sentence)}")
    options = [record["option1"], record["option2"]]
    return Item(sentence, options, _label(record, "answer", ("1", "2")))


def _arc(record: Record, question: str = "question") -> Item:
    """Options with letters or numbers of their own, which ``answerKey`` names."""
    choices = record["choices"]
    if isinstance(choices, list) and all(isinstance(choice, Mapping) for choice in choices):
        # The original files hold a list of objects.
        choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
    texts = choices.get("text") if isinstance(choices, Mapping) else None
    labels = choices.get("label") if isinstance(choices, Mapping) else None
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        raise DataError(
            f"field 'choices' must hold 'text' and 'label', two lists of equal length, found "
            f"{brief(record['choices'])}"
        )
    return Item(require_text(record, question), texts, _label(record, "answerKey", tuple(map(str, labels))))


def _label(record: Record, column: str, labels: tuple[str, ...]) -> int:
    value = record[column]
    text = str(value).strip()
    if isinstance(value, bool) or text not in labels:
        hint = ". Splits without labels cannot be used: use the validation split" if value in ("", -1) else ""
        known = brief(", ".join(labels))[1:-1]
        raise DataError(f"field {column!r} is {brief(value)}, outside of the options {known}{hint}")
    return labels.index(text)


_TASKS: dict[str, tuple[tuple[str, ...], Callable[[Record], Item]]] = {
    "piqa": (("goal", "sol1", "sol2", "label"), _piqa),
    "siqa": (("context", "question", "answerA", "answerB", "answerC", "label"), _siqa),
    "hellaswag": (("activity_label", "ctx", "endings", "label"), _hellaswag),
    "winogrande": (("sentence", "option1", "option2", "answer"), _winogrande),
    "openbookqa": (("question_stem", "choices", "answerKey"), partial(_arc, question="question_stem")),
    ARC: (("question", "choices", "answerKey"), _arc),
    "boolq": (("question", "answer", "passage"), _boolq),
}
"""Columns that identify a task, and the parser of its records."""

HUB_TASK = Format(
    "the columns of a task's hub original", (), lambda record: hub_task(record) is not None, _parse
)
