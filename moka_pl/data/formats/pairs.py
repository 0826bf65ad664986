"""What is asked, and its answer: the columns of Alpaca, Dolly, FLAN, and prompts with completions."""

from moka_pl.data.formats.base import Format, Record, require_text

_COLUMNS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("inputs", None, "targets"),
)
"""Columns of the instruction, of its optional input, and of the answer."""


def _fits(record: Record) -> bool:
    return any(asked in record or answer in record for asked, _, answer in _COLUMNS)


def _parse(record: Record) -> dict[str, str]:
    asked, added, answer = max(_COLUMNS, key=lambda columns: _filled(record, columns[0], columns[2]))
    row = {"instruction": require_text(record, asked), "output": require_text(record, answer)}
    if added is not None and record.get(added) is not None:
        row["input"] = require_text(record, added)
    return row


def _filled(record: Record, *columns: str) -> int:
    """Returns how well columns are filled: one that is there counts 1, one with a value 3 more."""
    return sum((column in record) + 3 * (record.get(column) is not None) for column in columns)


PAIRS = Format(
    "an instruction (instruction, input, output of Alpaca, or instruction, context, response of Dolly), or a "
    "prompt with its completion (prompt and completion, prompt and response, inputs and targets)",
    tuple(dict.fromkeys(column for columns in _COLUMNS for column in columns if column is not None)),
    _fits,
    _parse,
)
