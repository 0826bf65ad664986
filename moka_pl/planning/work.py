"""The work of a run: tokens, batches and steps, from data that are here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy

from moka_pl.data import MokaDataModule
from moka_pl.data.batching.collate import padded
from moka_pl.data.batching.order import train_sampler
from moka_pl.errors import DataError
from moka_pl.hub import offline_mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Work:
    """What is trained on.

    Attributes:
        batches: (T, N) of micro-batches: padded tokens, and those that are predicted. None has more of both
            than one of these.
        examples: Training examples of an epoch; None where unknown, as all below.
        epoch_tokens: Their tokens, without padding.
        epoch_batches: Micro-batches of each rank.
        steps: Optimizer steps of the run.
        tokens: Tokens of the run, all ranks together; where the data are unknown, the most that its steps
            take.
        unknown: Why the data's size is unknown; empty where it is not.
    """

    batches: list[tuple[int, int]]
    examples: int | None = None
    epoch_tokens: int | None = None
    epoch_batches: int | None = None
    steps: int | None = None
    tokens: int | None = None
    unknown: str = ""


@dataclass(frozen=True)
class Run:
    """The trainer's options that count.

    Attributes:
        ranks: Processes, over all nodes.
        options: All of them by name.
    """

    ranks: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def number(self, name: str, default: Any) -> Any:
        """An option, or its default where it is left out or None."""
        value = self.options.get(name)
        return default if value is None else value


def plan_work(
    data: MokaDataModule,
    tokenizer: "PreTrainedTokenizerBase | None",
    run: Run,
    trained_prompt: str | None = None,
) -> Work:
    """Counts the training data with the package's own encoding, if they and the tokenizer are here.

    What is encoded stays in the cache for the run.

    Args:
        data: The data module.
        tokenizer: The base's tokenizer; None where it would have to be downloaded.
        run: The trainer's options.
        trained_prompt: The prompt of the adapter that the run starts from, if any.
    """
    width = padded(data.row_length)
    most = data.max_tokens or data.batch_size * width
    largest = [(most, most)]
    steps = run.number("max_steps", -1)
    per_step = most * run.number("accumulate_grad_batches", 1) * run.ranks
    bounded = (steps, steps * per_step) if steps > 0 else (None, None)
    if data.streaming:
        return Work(largest, steps=bounded[0], tokens=bounded[1], unknown="the training data are a stream")
    if tokenizer is None:
        reason = "the tokenizer is not on this machine"
        return Work(largest, steps=bounded[0], tokens=bounded[1], unknown=reason)
    data.connect(tokenizer, trained_prompt)
    try:
        with offline_mode():
            encoded = data.encode("train")
    except DataError as error:
        return Work(largest, steps=bounded[0], tokens=bounded[1], unknown=str(error))
    if encoded is None:
        return Work(largest, unknown="there are no training data")
    rows = encoded.rows
    lengths = rows["length"][:]
    trained = rows["trained"][:] if "trained" in rows.column_names else lengths
    sampler = train_sampler(data, lengths, run.ranks, 0)
    tokens, counted = numpy.asarray(lengths), numpy.asarray(trained)
    pairs = set()
    for batch in sampler.global_batches():
        for rank in range(min(run.ranks, len(batch))):
            share = batch[rank :: run.ranks]
            sizes = [int(tokens[row].sum()) for row in share]
            pairs.add((padded(max(sizes)) * len(sizes), sum(int(counted[row].sum()) for row in share)))
    batches = _limited(len(sampler), run.number("limit_train_batches", 1.0))
    steps, epochs = _steps(batches, run)
    total = int(tokens.sum())
    share_of = batches / max(1, len(sampler))
    return Work(_largest(pairs), len(lengths), total, batches, steps, round(total * share_of * epochs))


def _limited(batches: int, limit: int | float) -> int:
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def _steps(batches: int, run: Run) -> tuple[int | None, float]:
    """Optimizer steps of the run, and its epochs, perhaps a part of one."""
    each = math.ceil(batches / run.number("accumulate_grad_batches", 1))
    most = run.number("max_steps", -1)
    epochs = run.number("max_epochs", -1 if most > 0 else 1000)  # Lightning's defaults, where both are null
    if most > 0 and (epochs < 0 or most < each * epochs):
        return most, most / max(1, each)
    return (None, 1.0) if epochs < 0 else (each * epochs, float(epochs))


def _largest(pairs: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those pairs that no other one exceeds in both numbers."""
    kept: list[tuple[int, int]] = []
    for pair in sorted(pairs, reverse=True):
        if not kept or pair[1] > kept[-1][1]:
            kept.append(pair)
    return kept
