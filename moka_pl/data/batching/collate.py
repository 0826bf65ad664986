"""Encoded rows to padded batches.

There is no attention mask: padding stands on the right, where causal attention never looks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from moka_pl.data.batching.samplers import filler
from moka_pl.lm.scoring import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset


# The layout of multiple-choice items in which a prompt stands once, before all of its options.


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


# Encoded rows to padded batches.
#
# There is no attention mask: padding stands on the right, where causal attention never looks.


MULTIPLE = 8
"""Batches are padded to a multiple of this many tokens; matrix units like it."""

COUNTED = ("words", "bytes")
"""Columns of plain text that a batch holds the sums of."""

Batch = dict[str, Any]


class BatchRows(TorchDataset[Batch]):
    """Makes one batch of a list of indices; a negative index `-1 - i` is row i as a filler.

    A list of lists of indices makes a packed batch: one row of each list.

    Args:
        rows: Encoded rows, plain or multiple-choice.
        pad_id: Token id of the padding.
        share: Whether the prompt of a multiple-choice item is shared by its options.
    """

    def __init__(self, rows: "Dataset", pad_id: int, share: SharePrefix = "auto") -> None:
        self.choices = "option_ids" in rows.column_names
        if self.choices:
            columns = ["prompt_ids", "option_ids", "option_chars", "option_names", "answer", "task"]
        else:
            columns = [name for name in ("input_ids", "labels", *COUNTED) if name in rows.column_names]
        self.rows = rows.select_columns(columns)
        self.pad_id = pad_id
        self.share = share

    def __len__(self) -> int:
        """Number of rows (not of batches)."""
        return len(self.rows)

    def __getitem__(self, index: int | Sequence[int] | Sequence[Sequence[int]]) -> Batch:
        # A single index comes from samplers that are not ours (Trainer(overfit_batches=...)).
        entries: list[Any] = [index] if isinstance(index, int) else list(index)
        sizes = [len(entry) for entry in entries if not isinstance(entry, int)]
        wanted: list[int] = list(chain.from_iterable(entries)) if sizes else entries
        fillers = [i < 0 for i in wanted]
        columns = self.rows[[filler(i) if i < 0 else i for i in wanted]]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if sizes:
            return collate_packs(rows, fillers, sizes, self.pad_id)
        if self.choices:
            return collate_choices(rows, fillers, self.pad_id, self.share)
        counted = {
            name: sum(row[name] for row, is_filler in zip(rows, fillers, strict=True) if not is_filler)
            for name in COUNTED
            if name in columns
        }
        return collate_tokens(rows, fillers, self.pad_id) | counted


def collate_tokens(rows: Sequence[dict[str, Any]], fillers: Sequence[bool], pad_id: int) -> Batch:
    """A batch of plain rows.

    Args:
        rows: With `input_ids` and `labels`.
        fillers: Which rows only fill the batch up; their labels are masked.
        pad_id: Token id of the padding.

    Returns:
        `input_ids` (B, T) and `labels` (B, T), int64, T a multiple of 8; `num_tokens` and `num_examples`,
        ints: the real tokens and rows, without padding and fillers.
    """
    ids = [row["input_ids"] for row in rows]
    labels = [
        [IGNORE_INDEX] * len(row["labels"]) if is_filler else row["labels"]
        for row, is_filler in zip(rows, fillers, strict=True)
    ]
    real = sum(len(row) for row, is_filler in zip(ids, fillers, strict=True) if not is_filler)
    return {
        "input_ids": _pad(ids, pad_id),
        "labels": _pad(labels, IGNORE_INDEX),
        "num_tokens": real,
        "num_examples": len(rows) - sum(fillers),
    }


def collate_packs(
    rows: Sequence[dict[str, Any]], fillers: Sequence[bool], sizes: Sequence[int], pad_id: int
) -> Batch:
    """A batch whose rows hold several examples, one after another.

    Args:
        rows: The examples of all packs, with `input_ids` and `labels`.
        fillers: Which examples only fill the batch up; their labels are masked.
        sizes: Number of examples of each pack.
        pad_id: Token id of the padding.

    Returns:
        What `collate_tokens` returns, without a label for the first token of an example, which nothing of its
        own predicts, and: `position_ids` (B, T), int64, beginning anew with every example and with the
        padding; `segment_starts` (S + 1,), int32: where the S examples and paddings begin in the flattened
        batch, and its size; `longest_segment`, an int.
    """
    examples = [
        {
            "input_ids": row["input_ids"],
            "labels": [IGNORE_INDEX] * len(row["labels"])
            if is_filler
            else [IGNORE_INDEX, *row["labels"][1:]],
        }
        for row, is_filler in zip(rows, fillers, strict=True)
    ]
    ends = list(accumulate(sizes))
    packs = [examples[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    joined = [
        {key: list(chain.from_iterable(row[key] for row in pack)) for key in ("input_ids", "labels")}
        for pack in packs
    ]
    batch = collate_tokens(joined, [False] * len(joined), pad_id)
    width = batch["input_ids"].shape[1]
    segments: list[int] = []
    for pack in packs:
        lengths = [len(row["input_ids"]) for row in pack]
        segments += [*lengths, *([width - sum(lengths)] if sum(lengths) < width else [])]
    positions = torch.cat([torch.arange(length) for length in segments])  # (B * T,)
    real = [row for row, is_filler in zip(rows, fillers, strict=True) if not is_filler]
    return batch | {
        "num_tokens": sum(len(row["input_ids"]) for row in real),
        "num_examples": len(real),
        "position_ids": positions.view(len(packs), width),
        "segment_starts": torch.tensor([0, *accumulate(segments)], dtype=torch.int32),
        "longest_segment": max(segments),
    }


def collate_choices(
    items: Sequence[dict[str, Any]], fillers: Sequence[bool], pad_id: int, share: SharePrefix = "never"
) -> Batch:
    """A batch of multiple-choice items: one row per option.

    Args:
        items: With `prompt_ids`, `option_ids`, `option_chars`, `answer` and `task`; with `option_names` where
            answers are generated, too.
        fillers: Which items only fill the batch up; their labels are masked, their `task` is -1, and none of
            their options is the answer.
        pad_id: Token id of the padding.
        share: "auto" adds the layout with shared prompts if it takes fewer slots.

    Returns:
        What `collate_tokens` returns, the labels covering the tokens of the option only, and per row: `item`
        (index of its item inside this batch), `task`, `option_chars` (characters of the option), all (B,)
        int64, and `is_answer` (B,) bool. `shared` (see `shared_tensors`), where that is cheaper. For
        generating: `questions`, the prompts of the I items padded on the left (`input_ids` and
        `attention_mask`, (I, T)), and `answer_names`, I texts, empty for fillers.
    """
    rows: list[dict[str, Any]] = []
    row_fillers: list[bool] = []
    item: list[int] = []
    task: list[int] = []
    chars: list[int] = []
    is_answer: list[bool] = []
    for number, (entry, is_filler) in enumerate(zip(items, fillers, strict=True)):
        prompt = entry["prompt_ids"]
        for choice, option in enumerate(entry["option_ids"]):
            rows.append({"input_ids": prompt + option, "labels": [IGNORE_INDEX] * len(prompt) + option})
            row_fillers.append(is_filler)
            item.append(number)
            task.append(-1 if is_filler else entry["task"])
            chars.append(entry["option_chars"][choice])
            is_answer.append(not is_filler and choice == entry["answer"])
    batch = collate_tokens(rows, row_fillers, pad_id) | {
        "item": torch.tensor(item, dtype=torch.int64),
        "task": torch.tensor(task, dtype=torch.int64),
        "option_chars": torch.tensor(chars, dtype=torch.int64),
        "is_answer": torch.tensor(is_answer, dtype=torch.bool),
    }
    if share == "auto" and not all(fillers):
        shared = shared_tensors(share_prefix(items, fillers), pad_id)
        if shared["input_ids"].numel() < batch["input_ids"].numel():
            batch["shared"] = shared
    if any(entry.get("option_names") for entry in items):
        batch["questions"] = _questions([entry["prompt_ids"] for entry in items], pad_id)
        batch["answer_names"] = [
            "" if is_filler else entry["option_names"][entry["answer"]]
            for entry, is_filler in zip(items, fillers, strict=True)
        ]
    return batch


def shared_tensors(rows: SharedRows, pad_id: int) -> dict[str, Tensor]:
    """The tensors of rows whose prompts are shared.

    Returns:
        `input_ids`, `position_ids` (I, S) and, unless plain causal attention does, `segments` (I, S), as in
        `SharedRows`; `place_row`, `place_column` (P,) and `place`, `target`, `option` (N,). All int64.
    """
    names = ("place_row", "place_column", "place", "target", "option")
    tensors = {name: torch.tensor(getattr(rows, name), dtype=torch.int64) for name in names}
    tensors["input_ids"] = _pad(rows.ids, pad_id)
    tensors["position_ids"] = _pad(rows.positions, 0)
    if rows.branches:
        tensors["segments"] = _pad(rows.segments, PADDING)
    return tensors


def _questions(prompts: Sequence[list[int]], pad_id: int) -> dict[str, Tensor]:
    """Prompts padded on the left, where generation goes on from their ends."""
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ),
    }


def padded(length: int) -> int:
    """Tokens of a row of `length` tokens with its padding, where no other row is longer."""
    return max(MULTIPLE, math.ceil(length / MULTIPLE) * MULTIPLE)


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = padded(max((len(row) for row in rows), default=0))
    out = torch.full((len(rows), width), value, dtype=torch.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return out
