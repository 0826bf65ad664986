"""Counts of the read, kept and dropped examples of a split."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy
from numpy.typing import NDArray

from moka_pl.errors import listed
from moka_pl.prompts.chats import EMPTY

KEPT, TRUNCATED, DROPPED = 0, 1, 2
"""Values of the column ``status`` of encoded rows."""

BLANK = "rows of empty cells"
"""What rows that say nothing are counted as, with where the first one stands."""

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
        ignored: Fields of the examples that are not used, each with how often it was there.
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
    ignored: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lost = f"; {self.left_out:,} shots dropped from {self.shortened:,} prompts" if self.shortened else ""
        return (
            f"{self.read:,} examples read, {self.kept:,} kept ({self.truncated:,} truncated), "
            f"{self.dropped:,} dropped; {self.tokens:,} tokens, {self.trained:,} trained or scored; "
            f"longest example {self.longest:,} tokens{lost}"
        )

    def __add__(self, other: "EncodingReport") -> "EncodingReport":
        """Returns the counts of both splits together."""
        names = [field.name for field in fields(self) if field.name not in ("longest", "ignored")]
        return EncodingReport(
            **{name: getattr(self, name) + getattr(other, name) for name in names},
            longest=max(self.longest, other.longest),
            ignored=dict(Counter(self.ignored) + Counter(other.ignored)),
        )


def merged(*ignored: str | Mapping[str, int]) -> str:
    """Returns the JSON of counts of ignored fields together, empty if there are none.

    Args:
        *ignored: Counts, or their JSON.
    """
    total = sum_ignored(ignored)
    return json.dumps(total) if total else ""


def sum_ignored(ignored: Iterable[str | Mapping[str, int]]) -> dict[str, int]:
    """Returns the sums of counts of ignored fields, which are given as they are or as JSON."""
    texts: Counter[str] = Counter()
    counts: list[Mapping[str, int]] = []
    for part in ignored:
        if not isinstance(part, str):
            counts.append(part)
        elif part:
            texts[part] += 1
    total: Counter[str] = Counter()
    for text, times in texts.items():  # rows of a corpus have few different ones
        total.update({name: count * times for name, count in json.loads(text).items()})
    for one in counts:
        total.update(one)
    return dict(total)


def ignored_fields(ignored: Mapping[str, int]) -> str:
    """Returns what was not used, for a message: ``ignored: id (312 rows); ignored in messages: mood (3)``.

    Args:
        ignored: Names of fields, of messages' with ``messages[].`` before them, each with its number.
    """
    kinds: dict[str, list[str]] = {"ignored": [], "ignored in messages": [], "not trained": [], "skipped": []}
    for name, n in sorted(ignored.items(), key=lambda item: -item[1]):
        if name.startswith(_INSIDE):
            kinds["ignored in messages"].append(f"{name.removeprefix(_INSIDE)} ({n:,})")
        elif not name.startswith((EMPTY, BLANK)):
            kinds["ignored"].append(f"{name} ({n:,} {'row' if n == 1 else 'rows'})")
    for what, kind, one in (("not trained", EMPTY, "empty answer"), ("skipped", BLANK, "row of empty cells")):
        found = {name.removeprefix(kind): n for name, n in ignored.items() if name.startswith(kind)}
        if count := sum(found.values()):
            places = "; ".join(place.removeprefix(_AT) for place in found if place)
            kinds[what] = [f"{count:,} {one if count == 1 else kind}{f' ({places})' if places else ''}"]
    return "; ".join(f"{what}: {listed(names, _NAMED)}" for what, names in kinds.items() if names)


_AT = ": "
_INSIDE = "messages[]."
PLACES = 5
"""How many places of one kind are named."""


def placed(kind: str, places: Sequence[str]) -> str:
    """Returns the name under which rows of one kind are counted: the kind, and where the first ones stand."""
    more = "; ..." if len(places) > PLACES else ""
    return f"{kind}{_AT}{'; '.join(places[:PLACES])}{more}"


_NAMED = 20


def count_rows(
    columns: Mapping[str, Sequence[int] | NDArray[numpy.int64]], ignored: Iterable[str] = ()
) -> EncodingReport:
    """Counts what became of encoded rows.

    Args:
        columns: Their columns ``COUNTED``, and ``left_out`` of multiple choice.
        ignored: Their column ``ignored``.
    """
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
        ignored=sum_ignored(ignored),
    )
