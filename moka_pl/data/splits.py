"""Which rows are held out, a few rows of every task, and evaluation items that were trained on."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from moka_pl._compat import rows_fingerprint
from moka_pl.errors import DataError
from moka_pl.utils import warn

if TYPE_CHECKING:
    from datasets import Dataset


_BESIDE = ("location", "ignored", "more")
"""Columns that are no content; ``more`` is, but most rows have none, and were held out without it before."""


class HoldOut:
    """Holds about a share of rows out, and remembers the split of the rows it saw last.

    Which rows are held out depends on their content alone: not on a seed, so runs with other seeds are
    compared on the same rows; and equal rows stay together, so nothing trained on is validated on.

    Args:
        share: Share of the rows to hold out, at least 0 and below 1, else a ``DataError``.
    """

    def __init__(self, share: float) -> None:
        if not 0 <= share < 1:
            raise DataError(f"validation_share must be at least 0 and below 1, got {share}")
        self.share = share
        self._last: tuple[str, tuple[Dataset, Dataset]] | None = None

    def __call__(self, rows: "Dataset") -> tuple["Dataset", "Dataset"]:
        """Returns the checked rows to train on and those held out, each in their old order."""
        if self._last is None or self._last[0] != rows_fingerprint(rows):
            self._last = (rows_fingerprint(rows), self._split(rows))
        return self._last[1]

    def _split(self, rows: "Dataset") -> tuple["Dataset", "Dataset"]:
        groups: dict[str, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            row = {name: row[name] for name in row if name not in _BESIDE or (name == "more" and row[name])}
            groups[sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()].append(index)
        wanted = max(1, round(self.share * len(rows)))
        held: set[int] = set()
        for content in sorted(groups):
            if len(held) >= wanted:
                break
            held.update(groups[content])
        kept = [index for index in range(len(rows)) if index not in held]
        if not kept:
            raise DataError(
                f"too few different examples ({len(groups)}) to hold out {self.share:.0%} of {len(rows)} for "
                "validation. Give a validation_path, or set validation_share: 0 to train without validation"
            )
        return rows.select(kept), rows.select(sorted(held))


def subsample(rows: "Dataset", limit: int) -> "Dataset":
    """Takes at most ``limit`` rows of every ``task``, evenly spread over its rows, in their old order."""
    by_task: dict[str, list[int]] = defaultdict(list)
    for index, task in enumerate(rows["task"][:]):
        by_task[task].append(index)
    chosen: list[int] = []
    for indices in by_task.values():
        count = min(limit, len(indices))
        chosen += [indices[step * len(indices) // count] for step in range(count)]
    return rows.select(sorted(chosen))


_CHUNK = 10_000


def warn_of_overlap(name: str, train: "Dataset | None", held: "Dataset") -> int:
    """Warns if items of an evaluation set are also in the training data, and returns how many.

    Items are the same if their texts are, whatever the case, the white space and the order of the options.

    Args:
        name: What the data are called.
        train: Checked rows that are trained on, if any.
        held: Checked rows that are evaluated on.
    """
    known = dict(_contents(train)) if train is not None else {}
    shared = [(location, known[content]) for content, location in _contents(held) if content in known]
    if shared:
        here, there = shared[0]
        warn(
            f"{name}: {len(shared):,} of {len(held):,} evaluation items are also in the training data "
            f"(first: {here}, trained on as {there}). Their scores are not meaningful; remove them from one "
            "of the two"
        )
    return len(shared)


def _contents(rows: "Dataset") -> Iterator[tuple[int, str]]:
    """A hash of every row's texts, and the location of the row."""
    for chunk in rows.iter(_CHUNK):
        for values in zip(*chunk.values(), strict=True):
            row = dict(zip(chunk, values, strict=True))
            yield hash(_content(row)), row["location"]


def _content(row: Mapping[str, Any]) -> tuple[Any, ...]:
    if "choices" in row:
        return _plain(row["question"]), *sorted(map(_plain, row["choices"]))
    turns = [(message["role"], _plain(message["content"] or "")) for message in row["messages"]]
    return (*(_plain(row[field]) for field in ("instruction", "input", "output", "more")), *turns)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
