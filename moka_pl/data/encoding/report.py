"""Counts of the read, kept and dropped examples of a split."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from operator import add

import numpy
from numpy.typing import NDArray

KEPT, TRUNCATED, DROPPED = 0, 1, 2
"""Values of the column ``status`` of encoded rows."""

COUNTED = ("status", "tokens", "trained", "full_length")
"""Columns of encoded rows that a report counts."""


@dataclass(frozen=True)
class EncodingReport:
    """Counts over one split.

    Attributes:
        read: Examples read.
        kept: Examples that are used, truncated ones included.
        truncated: Used examples that lost tokens to ``max_length``.
        dropped: Examples left out because no trained (or scorable) token fits into ``max_length``.
        tokens: Tokens of the kept examples; for multiple choice over all rows (prompt and option).
        trained: Tokens that are trained or scored.
        longest: Tokens of the longest example read, before any cut.
        shortened: Questions whose prompt lost solved examples (shots) to ``max_length``.
        left_out: Total number of these lost examples.
    """

    read: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    shortened: int = 0
    left_out: int = 0

    def __str__(self) -> str:
        lost = f"; {self.left_out:,} shots dropped from {self.shortened:,} prompts" if self.shortened else ""
        return (
            f"{self.read:,} examples read, {self.kept:,} kept ({self.truncated:,} truncated), "
            f"{self.dropped:,} dropped; {self.tokens:,} tokens, {self.trained:,} trained or scored; "
            f"longest example {self.longest:,} tokens{lost}"
        )

    def __add__(self, other: "EncodingReport") -> "EncodingReport":
        """Returns the counts of both splits together."""
        sums = EncodingReport(*map(add, astuple(self), astuple(other)))
        return replace(sums, longest=max(self.longest, other.longest))


def count_rows(columns: Mapping[str, Sequence[int] | NDArray[numpy.int64]]) -> EncodingReport:
    """Counts what became of encoded rows by the columns ``COUNTED``; of multiple choice ``left_out``, too."""
    values = {name: numpy.asarray(column, dtype=numpy.int64) for name, column in columns.items()}
    kept = values["status"] != DROPPED
    left_out = values.get("left_out", numpy.zeros(0))
    return EncodingReport(
        read=len(kept),
        kept=int(kept.sum()),
        truncated=int((values["status"] == TRUNCATED).sum()),
        dropped=int((~kept).sum()),
        tokens=int(values["tokens"][kept].sum()),
        trained=int(values["trained"][kept].sum()),
        longest=int(values["full_length"].max(initial=0)),
        shortened=int((left_out > 0).sum()),
        left_out=int(left_out.sum()),
    )
