"""Warn of evaluation items that were trained on."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

if TYPE_CHECKING:
    from datasets import Dataset

_CHUNK = 10_000


def warn_of_overlap(name: str, train: "Dataset | None", held: "Dataset") -> int:
    """Warn if items of an evaluation set are also in the training data.

    Items are the same if their texts are, whatever the case, the white space and the order of the options.

    Args:
        name: What the data are called.
        train: Checked rows that are trained on, if any.
        held: Checked rows that are evaluated on.

    Returns:
        How many of the evaluation items are in the training data.
    """
    known = dict(_contents(train)) if train is not None else {}
    shared = [(where, known[content]) for content, where in _contents(held) if content in known]
    if shared:
        here, there = shared[0]
        rank_zero_warn(
            f"{name}: {len(shared):,} of {len(held):,} evaluation items are also in the training data (the "
            f"first: {here}, trained on as {there}). Their scores say little; take them out of one of "
            "the two."
        )
    return len(shared)


def _contents(rows: "Dataset") -> Iterator[tuple[int, str]]:
    """A hash of every row's texts, and where the row stands."""
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        for values in zip(*chunk.values(), strict=True):
            row = dict(zip(chunk, values, strict=True))
            yield hash(_content(row)), row["where"]


def _content(row: Mapping[str, Any]) -> tuple[Any, ...]:
    if "choices" in row:
        return _plain(row["question"]), *sorted(map(_plain, row["choices"]))
    turns = [(message["role"], _plain(message["content"])) for message in row["messages"]]
    return (*(_plain(row[field]) for field in ("instruction", "input", "output")), *turns)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
