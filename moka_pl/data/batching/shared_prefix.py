"""The layout of multiple-choice items in which a prompt stands once, before all of its options."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

SharePrefix = Literal["auto", "never"]
"""Whether an item's prompt is computed once for all of its options where that takes fewer slots."""

PROMPT, PADDING = 0, -1
"""Segments of tokens that all options see, and that none does; option k is segment k + 1."""


@dataclass
class SharedRows:
    """One row an item: `[prompt][option 1][option 2]...`, and which position predicts which token.

    The last token of an option predicts nothing, so it is no part of its row; an option of a single token
    takes no slot at all.

    Attributes:
        ids: Token ids of every row.
        positions: Position ids of every row, which begin again after the prompt for every option.
        segments: PROMPT or the option's segment, for every token of every row.
        place_row: Row of every position that predicts something.
        place_column: Its column.
        place: For every scored token, the index of the place that predicts it.
        target: Its token id.
        option: The option that it belongs to, counted over the whole batch, fillers included.
    """

    ids: list[list[int]] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    segments: list[list[int]] = field(default_factory=list)
    place_row: list[int] = field(default_factory=list)
    place_column: list[int] = field(default_factory=list)
    place: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    option: list[int] = field(default_factory=list)

    @property
    def branches(self) -> bool:
        """Whether any option has a token of its own in the rows; without one plain causal attention does."""
        return any(row[-1] != PROMPT for row in self.segments)


def share_prefix(items: Sequence[dict[str, Any]], fillers: Sequence[bool]) -> SharedRows:
    """Lay items out with their prompts once.

    Args:
        items: With `prompt_ids` and `option_ids`, none of them empty.
        fillers: Which items only fill the batch up; they get no row.
    """
    rows = SharedRows()
    option = 0
    for item, is_filler in zip(items, fillers, strict=True):
        if is_filler:
            option += len(item["option_ids"])
            continue
        prompt = item["prompt_ids"]
        ids, positions, segments = list(prompt), list(range(len(prompt))), [PROMPT] * len(prompt)
        row = len(rows.ids)
        first = _place(rows, row, len(prompt) - 1)
        for number, tokens in enumerate(item["option_ids"]):
            place = first
            for offset, token in enumerate(tokens):
                rows.place.append(place)
                rows.target.append(token)
                rows.option.append(option)
                if offset < len(tokens) - 1:
                    place = _place(rows, row, len(ids))
                    ids.append(token)
                    positions.append(len(prompt) + offset)
                    segments.append(number + 1)
            option += 1
        rows.ids.append(ids)
        rows.positions.append(positions)
        rows.segments.append(segments)
    return rows


def _place(rows: SharedRows, row: int, column: int) -> int:
    rows.place_row.append(row)
    rows.place_column.append(column)
    return len(rows.place_row) - 1
