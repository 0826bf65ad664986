"""The LLM-Adapters form of the commonsense tasks: question and options in one prompt."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from moka_pl.data.readers import Located
from moka_pl.errors import DataError

LLM_ADAPTERS_FORM = "the LLM-Adapters form (instruction, answer)"
SCIENCE = "science"
"""Task of the records of ARC and OpenBookQA in a file that mixes tasks, where nothing tells them apart."""

_LEAD = re.compile(r"^\s*Please [^:]*:\s*")
_FORMAT = re.compile(r"\s*Answer format:\s*(?P<labels>\S+)\s*$", re.IGNORECASE)
_TASK_OF_LABEL = {"true": "boolq", "solution1": "piqa", "ending1": "hellaswag", "option1": "winogrande"}


def parse_llm_adapters(record: dict[str, Any], location: str) -> tuple[str, list[str], int]:
    """Take a prompt of the LLM-Adapters commonsense corpora apart.

    Such a prompt reads `Please choose ...: QUESTION Answer1: ... Answer2: ... Answer format:
    answer1/answer2`, with `Solution`, `Ending` or `Option` in place of `Answer` for some tasks, or ends in
    `Answer format: true/false` and lists no options.

    Args:
        record: Fields `instruction` and `answer`; others are not looked at.
        location: Its position, for messages.

    Returns:
        The question, the texts of the options, and the index of the right one.

    Raises:
        DataError: The prompt has another form, or the answer is none of its options.
    """
    for field in ("instruction", "answer"):
        if not isinstance(record.get(field), str):
            state = f"must be text, found {record[field]!r}" if field in record else "is missing"
            raise DataError(f"{location}: field {field!r} {state}. Expected {LLM_ADAPTERS_FORM}.")
    text = record["instruction"]
    ending = _FORMAT.search(text)
    if ending is None:
        raise DataError(
            f"{location}: field 'instruction' does not end in 'Answer format: ...'. Expected "
            f"{LLM_ADAPTERS_FORM}."
        )
    labels = _labels(ending)
    body = text[: ending.start()]
    if [label.lower() for label in labels] == ["true", "false"]:
        options = ["true", "false"]
    else:
        body, options = _options(body, labels, location)
    answer = record["answer"].strip().lower()
    known = [label.lower() for label in labels]
    if answer not in known:
        raise DataError(
            f"{location}: field 'answer' is {record['answer']!r}, outside of the options {', '.join(labels)}."
        )
    return _LEAD.sub("", body).strip(), options, known.index(answer)


def name_tasks(located: Iterable[Located]) -> Iterator[Located]:
    """Add the field `task` to the records of a file in the LLM-Adapters form that mixes tasks.

    Whether it mixes them can only be said after all of it was read. A file of one task passes unchanged, and
    so do records that name their task or are in another form.

    Args:
        located: All records of a file with their positions.

    Yields:
        Positions and records.
    """
    records = list(located)
    told = [_tell(record, location) for location, record in records]
    wordings = {wording for wording, _ in told} - {""}
    mixed = len(wordings) > 1
    for (location, record), (_, task) in zip(records, told, strict=True):
        yield location, (record | {"task": task} if mixed and task is not None else record)


def tell_task(instruction: str, options: list[str]) -> str:
    """Which of the eight tasks a prompt of a mixed file is from.

    BoolQ, PIQA, HellaSwag and WinoGrande are told by the names of their options. Social IQa, ARC-Easy,
    ARC-Challenge and OpenBookQA share one wording: three options are taken for Social IQa's, and all else is
    `science`.

    Args:
        instruction: The whole prompt.
        options: Its options.

    Returns:
        Name of the task, or `science`.
    """
    other = "siqa" if len(options) == 3 else SCIENCE
    return _TASK_OF_LABEL.get(_wording(instruction), other)


def _tell(record: dict[str, Any], location: str) -> tuple[str, str | None]:
    """Wording and task of a record; neither for one that names its task or is in another form."""
    if "choices" in record or "instruction" not in record or record.get("task") is not None:
        return "", None
    _, options, _ = parse_llm_adapters(record, location)
    return _wording(record["instruction"]), tell_task(record["instruction"], options)


def _wording(instruction: str) -> str:
    """What the first option is called: `true`, `answer1`, `solution1`, `ending1` or `option1`."""
    ending = _FORMAT.search(instruction)
    return _labels(ending)[0].lower() if ending is not None else ""


def _labels(ending: re.Match[str]) -> list[str]:
    return ending["labels"].rstrip(".").split("/")


def _options(body: str, labels: list[str], location: str) -> tuple[str, list[str]]:
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
                f"{location}: field 'instruction' has no '{label[:1].upper()}{label[1:]}:' although its "
                "answer format names it."
            )
        options.append(body[start + len(marker) : end].strip())
        end = start
    return body[:end], options[::-1]
