"""The LLM-Adapters format of the commonsense tasks: question and options in one prompt.

Such a prompt reads ``Please choose ...: QUESTION Answer1: ... Answer2: ... Answer format: answer1/answer2``,
with ``Solution``, ``Ending`` or ``Option`` in place of ``Answer`` for some tasks, or ends in ``Answer format:
true/false`` and lists no options.
"""

import re
from collections.abc import Iterable, Iterator

from moka_pl.data.formats.base import Format, Record, brief, require_text
from moka_pl.data.formats.common import Item
from moka_pl.data.readers import Located, located
from moka_pl.errors import DataError, printable

SCIENCE = "science"
"""Task of ARC's and OpenBookQA's records in a file that mixes tasks: nothing tells them apart."""

_LEAD = re.compile(r"^\s*Please [^:]*:\s*")
_FORMAT = re.compile(r"Answer format:\s*(?P<labels>\S+)\s*$", re.IGNORECASE)
_TASK_OF_LABEL = {"true": "boolq", "solution1": "piqa", "ending1": "hellaswag", "option1": "winogrande"}


def _fits(record: Record) -> bool:
    return "instruction" in record and "choices" not in record


def _parse(record: Record) -> Item:
    text, answer = (require_text(record, field) for field in ("instruction", "answer"))
    ending = _FORMAT.search(text)
    if ending is None:
        raise DataError("field 'instruction' does not end in 'Answer format: ...'")
    labels = ending["labels"].rstrip(".").split("/")
    names = [label.lower() for label in labels]
    body = text[: ending.start()].rstrip()
    body, options = (body, ["true", "false"]) if names == ["true", "false"] else _split_options(body, labels)
    if answer.strip().lower() not in names:
        known = brief(", ".join(labels))[1:-1]
        raise DataError(f"field 'answer' is {brief(answer)}, outside of the options {known}")
    question = _LEAD.sub("", body).strip()
    return Item(question, options, names.index(answer.strip().lower()), published=True)


def name_tasks(records: Iterable[Located]) -> Iterator[Located]:
    """Adds the field ``task`` to the records of a file that mixes tasks.

    BoolQ, PIQA, HellaSwag and WinoGrande are told by the names of their options. Social IQa, ARC-Easy,
    ARC-Challenge and OpenBookQA share one wording: three options are taken for Social IQa's, and all else is
    ``science``. Whether a file mixes tasks can only be said after all of it was read. A file of one task
    passes unchanged, and so do records that name their task or are in another format.
    """
    records = list(records)
    told: dict[int, tuple[str, str]] = {}
    for number, (location, record) in enumerate(records):
        if _fits(record) and record.get("task") is None:
            with located(location):
                told[number] = _tell(record)
    mixed = len({wording for wording, _ in told.values()}) > 1
    for number, (location, record) in enumerate(records):
        if mixed and number in told:
            record["task"] = told[number][1]
        yield location, record


def _tell(record: Record) -> tuple[str, str]:
    """Returns what a record calls its first option, and the task that this and the number of options tell."""
    options = _parse(record).choices
    ending = _FORMAT.search(record["instruction"])
    assert ending is not None
    wording = ending["labels"].split("/")[0].lower().rstrip(".")
    return wording, _TASK_OF_LABEL.get(wording, "siqa" if len(options) == 3 else SCIENCE)


def _split_options(body: str, labels: list[str]) -> tuple[str, list[str]]:
    """Splits ``QUESTION Answer1: a Answer2: b`` at its labels, from the last one backwards.

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
                f"field 'instruction' has no '{printable(label[:1].upper() + label[1:], 60)}:' although its "
                "answer format names it"
            )
        options.append(body[start + len(marker) : end].strip())
        end = start
    return body[:end], options[::-1]


LLM_ADAPTERS = Format(
    "the LLM-Adapters format (instruction, answer)", ("instruction", "answer"), _fits, _parse
)
