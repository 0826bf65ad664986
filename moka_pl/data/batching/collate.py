"""Encoded rows to padded batches, in the layouts that ``moka_pl.data.types`` describes."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, chain, islice, pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset as TorchDataset

from moka_pl.data.batching.samplers import filler
from moka_pl.data.types import (
    Batch,
    ChoiceBatch,
    PackedBatch,
    PlainBatch,
    Questions,
    SharedPrompts,
    TokenBatch,
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

    A list of lists of indices makes a packed batch: one row of each list, all of it fillers or none.

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
        columns = self.rows[[filler(i) if i < 0 else i for i in wanted]]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if sizes:
            examples = iter(rows)
            packs = [list(islice(examples, size)) for size in sizes]
            packed = collate_packs(packs, [pack[0] < 0 for pack in entries], self.pad_id)
            packed["rows"] = [i for i in wanted if i >= 0]
            return packed
        fillers = [i < 0 for i in wanted]
        if self.choices:
            return collate_choices(rows, fillers, self.pad_id, self.share)
        batch = collate_tokens(rows, fillers, self.pad_id)
        batch["rows"] = [i for i in wanted if i >= 0]
        if "words" in columns:
            real = [row for row, is_filler in zip(rows, fillers, strict=True) if not is_filler]
            batch["words"] = sum(row["words"] for row in real)
            batch["bytes"] = sum(row["bytes"] for row in real)
        return batch


def collate_tokens(rows: Sequence[dict[str, Any]], fillers: Sequence[bool], pad_id: int) -> PlainBatch:
    """A batch of plain rows, its tensors of shape (B, T), T a multiple of 8.

    Args:
        rows: With ``input_ids`` and ``labels``.
        fillers: Which rows only fill the batch up; their labels are masked.
        pad_id: Token id of the padding.
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
    packs: Sequence[Sequence[dict[str, Any]]], fillers: Sequence[bool], pad_id: int
) -> PackedBatch:
    """A batch whose rows hold several examples, one after another.

    The first token of an example has no label, as nothing of its own predicts it.

    Args:
        packs: The examples of every row, with ``input_ids`` and ``labels``.
        fillers: Which packs only fill the batch up; their labels are masked.
        pad_id: Token id of the padding.
    """
    rows = [
        {
            "input_ids": list(chain.from_iterable(example["input_ids"] for example in pack)),
            "labels": list(chain.from_iterable([IGNORE_INDEX, *example["labels"][1:]] for example in pack)),
        }
        for pack in packs
    ]
    tokens: TokenBatch = collate_tokens(rows, fillers, pad_id)
    width = tokens["input_ids"].shape[1]
    segments: list[int] = []
    for pack, row in zip(packs, rows, strict=True):
        padding = width - len(row["input_ids"])
        segments += [*(len(example["input_ids"]) for example in pack), *([padding] if padding else [])]
    positions = torch.cat([torch.arange(length) for length in segments])  # (B * T,)
    return {
        **tokens,
        "num_examples": sum(
            len(pack) for pack, is_filler in zip(packs, fillers, strict=True) if not is_filler
        ),
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
    about: list[tuple[bool, int, int, int, bool]] = []  # filler, item, task, option_chars and is_answer
    for number, (entry, is_filler) in enumerate(zip(items, fillers, strict=True)):
        prompt, task = entry["prompt_ids"], -1 if is_filler else entry["task"]
        for choice, option in enumerate(entry["option_ids"]):
            rows.append({"input_ids": prompt + option, "labels": [IGNORE_INDEX] * len(prompt) + option})
            is_answer = not is_filler and choice == entry["answer"]
            about.append((is_filler, number, task, entry["option_chars"][choice], is_answer))
    row_fillers, *columns = zip(*about, strict=True)
    tokens = collate_tokens(rows, row_fillers, pad_id)
    batch: ChoiceBatch = {
        "input_ids": tokens["input_ids"],
        "labels": tokens["labels"],
        "num_tokens": tokens["num_tokens"],
        "num_examples": tokens["num_examples"],
        "item": torch.tensor(columns[0]),
        "task": torch.tensor(columns[1]),
        "option_chars": torch.tensor(columns[2]),
        "is_answer": torch.tensor(columns[3]),
    }
    if share == "auto" and not all(fillers):
        shared = share_prompts(items, fillers, pad_id)
        if shared["input_ids"].numel() < batch["input_ids"].numel():
            batch["shared"] = shared
    if any(entry.get("option_names") for entry in items):
        batch["questions"] = _questions([torch.tensor(entry["prompt_ids"]) for entry in items], pad_id)
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


def _questions(prompts: list[Tensor], pad_id: int) -> Questions:
    pad_left = partial(pad_sequence, batch_first=True, padding_side="left")
    return {
        "input_ids": pad_left(prompts, padding_value=pad_id),
        "attention_mask": pad_left([torch.ones_like(prompt) for prompt in prompts]),
    }


def padded(length: int) -> int:
    """Tokens of a row of ``length`` tokens with its padding, where no other row is longer."""
    return max(MULTIPLE, math.ceil(length / MULTIPLE) * MULTIPLE)


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of equal length, (B, T), padded on the right."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    out = pad_sequence(tensors, batch_first=True, padding_value=value)
    return pad(out, (0, padded(out.shape[1]) - out.shape[1]), value=value)
