"""Check multiple-choice records: the common form and the LLM-Adapters form."""

import re
from typing import TYPE_CHECKING, Any

from moka_pl.data.errors import DataError

if TYPE_CHECKING:
    from datasets import Features

FORMS = (
    "Expected the common form (task, question, choices, answer) or the LLM-Adapters form "
    "(instruction, answer)"
)
_LEAD = re.compile(r"^\s*Please [^:]*:\s*")
_FORMAT = re.compile(r"\s*Answer format:\s*(?P<labels>\S+)\s*$", re.IGNORECASE)


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
    """Check one multiple-choice record of either form.

    Args:
        record: The record as it was read. With `choices` it is in the common form, with `instruction` in the
            LLM-Adapters form.
        where: Its position, for messages.
        context: Name of the task of records that do not name one.

    Returns:
        A row with the columns of `choice_features`.

    Raises:
        DataError: A field is missing or of a wrong type, there are fewer than two choices, a choice is empty,
            or the answer is none of the choices.
    """
    if "choices" not in record and "instruction" in record:
        question, choices, answer = parse_llm_adapters(record, where)
        task: object = context
    else:
        for field in ("question", "choices", "answer"):
            if field not in record:
                found = ", ".join(map(str, record)) or "nothing"
                raise DataError(f"{where}: field {field!r} is missing; found: {found}. {FORMS}.")
        question, choices, answer = record["question"], record["choices"], record["answer"]
        task = context if record.get("task") is None else record["task"]
    if not isinstance(task, str) or not task:
        raise DataError(f"{where}: field 'task' must be a name, found {task!r}.")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: field 'question' must be text that is not empty, found {question!r}.")
    _check_choices(choices, where)
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise DataError(
            f"{where}: field 'answer' must be the index of the right choice, counted from 0, found "
            f"{answer!r}."
        )
    if not 0 <= answer < len(choices):
        raise DataError(
            f"{where}: field 'answer' is {answer}, outside of the {len(choices)} choices "
            f"(0 to {len(choices) - 1}). Count from 0."
        )
    return {"where": where, "task": task, "question": question, "choices": choices, "answer": answer}


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


def parse_llm_adapters(record: dict[str, Any], where: str) -> tuple[str, list[str], int]:
    """Take a prompt of the LLM-Adapters commonsense corpora apart.

    Such a prompt reads `Please choose ...: QUESTION Answer1: ... Answer2: ... Answer format:
    answer1/answer2`, with `Solution`, `Ending` or `Option` in place of `Answer` for some tasks, or ends in
    `Answer format: true/false` and lists no options.

    Args:
        record: Fields `instruction` and `answer`; others are not looked at.
        where: Its position, for messages.

    Returns:
        The question, the texts of the options, and the index of the right one.

    Raises:
        DataError: The prompt has another form, or the answer is none of its options.
    """
    for field in ("instruction", "answer"):
        if not isinstance(record.get(field), str):
            state = f"must be text, found {record[field]!r}" if field in record else "is missing"
            raise DataError(f"{where}: field {field!r} {state}. {FORMS}.")
    text = record["instruction"]
    ending = _FORMAT.search(text)
    if ending is None:
        raise DataError(f"{where}: field 'instruction' does not end in 'Answer format: ...'. {FORMS}.")
    labels = ending["labels"].rstrip(".").split("/")
    body = text[: ending.start()]
    if [label.lower() for label in labels] == ["true", "false"]:
        options = ["true", "false"]
    else:
        body, options = _options(body, labels, where)
    answer = record["answer"].strip().lower()
    known = [label.lower() for label in labels]
    if answer not in known:
        raise DataError(
            f"{where}: field 'answer' is {record['answer']!r}, outside of the options {', '.join(labels)}."
        )
    return _LEAD.sub("", body).strip(), options, known.index(answer)


def _options(body: str, labels: list[str], where: str) -> tuple[str, list[str]]:
    """Split `QUESTION Answer1: a Answer2: b` at its labels, from the last one backwards.

    Backwards, because a question may hold what looks like a label while the list of options ends the text.
    """
    lower = body.lower()
    options: list[str] = []
    end = len(body)
    for label in reversed(labels):
        marker = f"{label.lower()}:"
        start = lower.rfind(marker, 0, end)
        if start < 0:
            raise DataError(
                f"{where}: field 'instruction' has no '{label[:1].upper()}{label[1:]}:' although its answer "
                "format names it."
            )
        options.append(body[start + len(marker) : end].strip())
        end = start
    return body[:end], options[::-1]
