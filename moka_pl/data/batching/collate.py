"""Encoded rows to padded batches, in the layouts that ``moka_pl.data.types`` describes."""

import math
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from moka_pl.data.batching.samplers import filler
from moka_pl.data.types import (
    Batch,
    ChoiceBatch,
    PackedBatch,
    PlainBatch,
    Questions,
    SharedPrompts,
)
from moka_pl.lm.scoring import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset

MULTIPLE = 8
"""Batches are padded to a multiple of this many tokens; matrix units like it."""

SharePrefix = Literal["auto", "never"]
"""Whether an item's prompt is computed once for all of its options where that takes fewer tokens."""

PROMPT, PADDING = 0, -1
"""Segments of tokens that all options see, and that none does; option k is segment k + 1."""

_COUNTED = ("words", "bytes")
_CHOICE_COLUMNS = ("prompt_ids", "option_ids", "option_chars", "option_names", "answer", "task")


class BatchRows(TorchDataset[Batch]):
    """Makes one batch of a list of indices; a negative index ``-1 - i`` is row i as a filler.

    A list of lists of indices makes a packed batch: one row of each list.

    Args:
        rows: Encoded rows, plain or multiple-choice.
        pad_id: Token id of the padding.
        share: Whether the prompt of a multiple-choice item is shared by its options.
    """

    def __init__(self, rows: "Dataset", pad_id: int, share: SharePrefix = "auto") -> None:
        self.choices = "option_ids" in rows.column_names
        columns = _CHOICE_COLUMNS if self.choices else ("input_ids", "labels", *_COUNTED)
        self.rows = rows.select_columns([name for name in columns if name in rows.column_names])
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
        batch = collate_tokens(rows, fillers, self.pad_id)
        if "words" in columns:
            real = [row for row, is_filler in zip(rows, fillers, strict=True) if not is_filler]
            batch["words"] = sum(row["words"] for row in real)
            batch["bytes"] = sum(row["bytes"] for row in real)
        return batch


def collate_tokens(rows: Sequence[dict[str, Any]], fillers: Sequence[bool], pad_id: int) -> PlainBatch:
    """A batch of plain rows.

    Args:
        rows: With ``input_ids`` and ``labels``.
        fillers: Which rows only fill the batch up; their labels are masked.
        pad_id: Token id of the padding.

    Returns:
        The batch, its tensors of shape (B, T), T a multiple of 8.
    """
    ids = [row["input_ids"] for row in rows]
    labels = [
        [IGNORE_INDEX] * len(row["labels"]) if is_filler else row["labels"]
        for row, is_filler in zip(rows, fillers, strict=True)
    ]
    return {
        "input_ids": _pad(ids, pad_id),
        "labels": _pad(labels, IGNORE_INDEX),
        "num_tokens": sum(len(row) for row, is_filler in zip(ids, fillers, strict=True) if not is_filler),
        "num_examples": len(rows) - sum(fillers),
    }


def collate_packs(
    rows: Sequence[dict[str, Any]], fillers: Sequence[bool], sizes: Sequence[int], pad_id: int
) -> PackedBatch:
    """A batch whose rows hold several examples, one after another.

    Args:
        rows: The examples of all packs, with ``input_ids`` and ``labels``.
        fillers: Which examples only fill the batch up; their labels are masked.
        sizes: Number of examples of each pack.
        pad_id: Token id of the padding.

    Returns:
        The batch, without a label for the first token of an example, which nothing of its own predicts.
    """
    labels = [
        [IGNORE_INDEX] * len(row["labels"]) if is_filler else [IGNORE_INDEX, *row["labels"][1:]]
        for row, is_filler in zip(rows, fillers, strict=True)
    ]
    ends = list(accumulate(sizes))
    packs = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    input_ids = _pad([list(chain.from_iterable(rows[i]["input_ids"] for i in p)) for p in packs], pad_id)
    width = input_ids.shape[1]
    segments: list[int] = []
    for pack in packs:
        lengths = [len(rows[i]["input_ids"]) for i in pack]
        segments += [*lengths, *([width - sum(lengths)] if sum(lengths) < width else [])]
    positions = torch.cat([torch.arange(length) for length in segments])  # (B * T,)
    real = [len(row["input_ids"]) for row, is_filler in zip(rows, fillers, strict=True) if not is_filler]
    return {
        "input_ids": input_ids,
        "labels": _pad([list(chain.from_iterable(labels[i] for i in p)) for p in packs], IGNORE_INDEX),
        "num_tokens": sum(real),
        "num_examples": len(real),
        "position_ids": positions.view(len(packs), width),
        "segment_starts": torch.tensor([0, *accumulate(segments)], dtype=torch.int32),
        "longest_segment": max(segments),
    }


def collate_choices(
    items: Sequence[dict[str, Any]], fillers: Sequence[bool], pad_id: int, share: SharePrefix = "never"
) -> ChoiceBatch:
    """A batch of multiple-choice items: one row per option.

    Args:
        items: With ``prompt_ids``, ``option_ids``, ``option_chars``, ``answer`` and ``task``; with
            ``option_names`` where answers are generated, too.
        fillers: Which items only fill the batch up; their labels are masked.
        pad_id: Token id of the padding.
        share: "auto" adds the layout with shared prompts if it takes fewer tokens with padding.
    """
    rows: list[dict[str, Any]] = []
    row_fillers: list[bool] = []
    columns: dict[str, list[int]] = {"item": [], "task": [], "option_chars": [], "is_answer": []}
    for number, (entry, is_filler) in enumerate(zip(items, fillers, strict=True)):
        prompt = entry["prompt_ids"]
        for choice, option in enumerate(entry["option_ids"]):
            rows.append({"input_ids": prompt + option, "labels": [IGNORE_INDEX] * len(prompt) + option})
            row_fillers.append(is_filler)
            columns["item"].append(number)
            columns["task"].append(-1 if is_filler else entry["task"])
            columns["option_chars"].append(entry["option_chars"][choice])
            columns["is_answer"].append(not is_filler and choice == entry["answer"])
    tokens = collate_tokens(rows, row_fillers, pad_id)
    batch: ChoiceBatch = {
        "input_ids": tokens["input_ids"],
        "labels": tokens["labels"],
        "num_tokens": tokens["num_tokens"],
        "num_examples": tokens["num_examples"],
        "item": torch.tensor(columns["item"]),
        "task": torch.tensor(columns["task"]),
        "option_chars": torch.tensor(columns["option_chars"]),
        "is_answer": torch.tensor(columns["is_answer"], dtype=torch.bool),
    }
    if share == "auto" and not all(fillers):
        shared = share_prompts(items, fillers, pad_id)
        if shared["input_ids"].numel() < batch["input_ids"].numel():
            batch["shared"] = shared
    if any(entry.get("option_names") for entry in items):
        batch["questions"] = _questions([entry["prompt_ids"] for entry in items], pad_id)
        batch["answer_names"] = [
            "" if is_filler else entry["option_names"][entry["answer"]]
            for entry, is_filler in zip(items, fillers, strict=True)
        ]
    return batch


def share_prompts(items: Sequence[dict[str, Any]], fillers: Sequence[bool], pad_id: int) -> SharedPrompts:
    """Lays items out with their prompts once.

    Args:
        items: With ``prompt_ids`` and ``option_ids``, none of them empty.
        fillers: Which items only fill the batch up; they get no row.
        pad_id: Token id of the padding.
    """
    rows: list[tuple[list[int], list[int], list[int]]] = []  # ids, positions and segments
    predictors: list[tuple[int, int]] = []  # (row, column) of what predicts something
    scored: list[tuple[int, int, int]] = []  # predictor, target and option of every scored token
    option = 0
    for item, is_filler in zip(items, fillers, strict=True):
        if is_filler:
            option += len(item["option_ids"])
            continue
        prompt = item["prompt_ids"]
        ids, positions, segments = list(prompt), list(range(len(prompt))), [PROMPT] * len(prompt)
        end = len(predictors)  # the prompt's last token predicts the first ones of all options
        predictors.append((len(rows), len(prompt) - 1))
        for number, tokens in enumerate(item["option_ids"], start=1):
            scored.append((end, tokens[0], option))
            for offset, (token, following) in enumerate(pairwise(tokens), start=len(prompt)):
                scored.append((len(predictors), following, option))
                predictors.append((len(rows), len(ids)))
                ids.append(token)
                positions.append(offset)
                segments.append(number)
            option += 1
        rows.append((ids, positions, segments))
    predictor_row, predictor_column = torch.tensor(predictors).unbind(1)  # (P,)
    predictor, target, scored_option = torch.tensor(scored).unbind(1)  # (N,)
    shared: SharedPrompts = {
        "input_ids": _pad([ids for ids, _, _ in rows], pad_id),
        "position_ids": _pad([positions for _, positions, _ in rows], 0),
        "predictor_row": predictor_row,
        "predictor_column": predictor_column,
        "predictor": predictor,
        "target": target,
        "option": scored_option,
    }
    if any(segments[-1] != PROMPT for _, _, segments in rows):
        shared["segments"] = _pad([segments for _, _, segments in rows], PADDING)
    return shared


def _questions(prompts: Sequence[list[int]], pad_id: int) -> Questions:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ),
    }


def padded(length: int) -> int:
    """Tokens of a row of ``length`` tokens with its padding, where no other row is longer."""
    return max(MULTIPLE, math.ceil(length / MULTIPLE) * MULTIPLE)


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of equal length, (B, T), padded on the right."""
    width = padded(max((len(row) for row in rows), default=0))
    out = torch.full((len(rows), width), value, dtype=torch.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return out
