"""Split rows into a training and a held-out part by their content."""

import json
from collections import defaultdict
from hashlib import sha256
from typing import TYPE_CHECKING

from moka_pl.errors_part import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def hold_out(rows: "Dataset", share: float) -> tuple["Dataset", "Dataset"]:
    """Hold about `share` of the rows out.

    Which rows are held out depends on their content alone: not on a seed, so runs with other seeds are
    compared on the same rows; and rows that are equal stay together, so nothing that was trained on is
    validated on.

    Args:
        rows: Checked rows; the column `where` is no part of their content.
        share: Share of the rows to hold out, between 0 and 1.

    Returns:
        The rows to train on and those held out, each in their old order.

    Raises:
        DataError: One of the parts would be empty.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows.remove_columns("where")):
        groups[sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()].append(index)
    wanted = max(1, round(share * len(rows)))
    held: set[int] = set()
    for content in sorted(groups):
        if len(held) >= wanted:
            break
        held.update(groups[content])
    kept = [index for index in range(len(rows)) if index not in held]
    if not kept:
        raise DataError(
            f"Too few different examples ({len(groups)}) to hold {share:.0%} of {len(rows)} out for "
            "validation. Give a validation_path, or validation_share: 0 to train without validation."
        )
    return rows.select(kept), rows.select(sorted(held))


class HoldOut:
    """Holds a share out, and remembers the split of the rows it saw last.

    Args:
        share: Share of the rows to hold out, at least 0 and below 1.

    Raises:
        DataError: The share is out of range.
    """

    def __init__(self, share: float) -> None:
        if not 0 <= share < 1:
            raise DataError(f"validation_share must be at least 0 and below 1, got {share}.")
        self.share = share
        self._last: tuple[str, tuple[Dataset, Dataset]] | None = None

    def __call__(self, rows: "Dataset") -> tuple["Dataset", "Dataset"]:
        """`hold_out(rows, share)`."""
        if self._last is None or self._last[0] != rows._fingerprint:
            self._last = (rows._fingerprint, hold_out(rows, self.share))
        return self._last[1]


class ThreeParts:
    """Training, validation and test rows that have nothing in common.

    Args:
        share: Share of the rows for validation, and, where there are no test rows of their own, the same
            share for the test.
    """

    def __init__(self, share: float) -> None:
        self._test, self._validation = HoldOut(share), HoldOut(share)

    def __call__(self, split: str, train: "Dataset", own: "Dataset | None") -> "Dataset":
        """The rows of a split.

        Args:
            split: `"train"`, `"validation"` or `"test"`.
            train: Rows to train on, of which a share is held out.
            own: Test rows of their own.
        """
        if own is None:
            train, own = self._test(train)
        if split == "test":
            return own
        return self._validation(train)[0 if split == "train" else 1]
