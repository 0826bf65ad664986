"""Validation metrics over all ranks: token-weighted loss, and right answers to multiple-choice items."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torchmetrics import Metric

from moka_pl.data.types import ChoiceBatch
from moka_pl.evaluation.results import Counts, Results, SetCounts

TIE = 1e-5
"""Relative difference below which log-likelihoods count as equal."""

_COUNTS = [f.name for f in fields(Counts)]
_PLAIN = ("nll", "tokens", "words", "bytes")


class Sums(Metric):
    """A table of sums of this shape over everything added on all ranks, in float64."""

    full_state_update = False
    total: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, rows: slice | int, values: Tensor) -> None:
        """Adds values to some rows."""
        self.total[rows] += values.to(self.total)

    def compute(self) -> Tensor:
        """The sums."""
        return self.total


@dataclass(frozen=True)
class ItemTable:
    """What the multiple-choice items of a batch scored.

    Attributes:
        set: Number of the evaluation set.
        task: Number of every item's task in the set, shape (I,).
        counts: The fields of :class:``Counts`` of every item, shape (I, 7).
    """

    set: int
    task: Tensor
    counts: Tensor


class EvalMetrics:
    """Gathers loss and right answers of one or more validation sets.

    The loss of a set is the mean negative log-likelihood per token; for multiple choice only the right
    option's tokens count. The accuracy of a task counts items whose right option has the highest summed
    log-likelihood; ``acc_norm`` first divides the sums by the options' numbers of characters. Over several
    sets the loss, and over several tasks the accuracy, is the plain mean: large sets do not drown small ones.

    Of options that tie the first one counts as the answer, as in lm-evaluation-harness, so that both agree on
    items that hold the same option twice. What is the same but for rounding ties, too: the last bits depend
    on what else is in the batch. An item with an undefined or infinite best score is answered wrongly.

    Numerators and denominators are sums, because ``torchmetrics.MeanMetric`` (1.9) drops its weights when it
    is told not to look for NaN, and hides NaN when it is not; here a NaN shows.

    Args:
        eval_sets: (name, tasks) of every set in dataloader order; no tasks for plain text.
        device: Where the sums are kept.
        groups: Tasks that are reported together, by the name of the group.

    Attributes:
        items: A list keeps what this rank's single items score, too; None (the default) keeps sums only.
    """

    def __init__(
        self,
        eval_sets: Sequence[tuple[str, Sequence[str]]],
        device: torch.device | str = "cpu",
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.sets = [(name, list(tasks)) for name, tasks in eval_sets]
        self.groups = {name: list(tasks) for name, tasks in (groups or {}).items()}
        self.plain = Sums(len(self.sets), len(_PLAIN)).to(device)
        # All tasks of all sets in one table: the subjects of MMLU alone are 57.
        self.choices = Sums(sum(len(tasks) for _, tasks in self.sets), len(_COUNTS)).to(device)
        self.items: list[ItemTable] | None = None
        for sums in (self.plain, self.choices):
            # torchmetrics warns of sums that nothing was added to; sets of plain text have no choices.
            sums.update(slice(0, 0), sums.total[:0])

    def update_loss(
        self, index: int, nll_sum: Tensor, tokens: Tensor, *, words: int = 0, bytes: int = 0
    ) -> None:
        """Adds a batch's loss.

        Args:
            index: Number of the set.
            nll_sum: Summed negative log-likelihood in nats, scalar.
            tokens: Number of tokens, scalar.
            words: Words of plain text that the tokens make.
            bytes: Bytes that they make.
        """
        values = [
            nll_sum.double(),
            tokens.double(),
            *(nll_sum.new_tensor(n).double() for n in (words, bytes)),
        ]
        self.plain.update(index, torch.stack(values))

    def update_choices(
        self,
        index: int,
        log_likelihood: Tensor,
        batch: ChoiceBatch,
        tokens: Tensor | None = None,
        generated: Tensor | None = None,
    ) -> None:
        """Adds the multiple-choice items of a batch.

        Args:
            index: Number of the set.
            log_likelihood: Of every option, shape (B,).
            batch: The items; only what it tells of its B rows is looked at. Options without a length
                (``option_chars``) have no ``acc_norm``.
            tokens: Tokens of every option, shape (B,), for the right options' likelihood by task.
            generated: Whether the generated answer of each item is right, shape (I,).
        """
        item, task, is_answer = batch["item"], batch["task"], batch["is_answer"]
        scores = log_likelihood.double()
        zeros = scores.new_zeros(int(item.max()) + 1)  # (I,)
        columns = {
            "items": torch.ones_like(zeros),
            "correct": zeros.index_add(0, item, is_right(scores, item, is_answer)),
            "correct_norm": torch.full_like(zeros, math.nan),
        }
        if "option_chars" in batch:
            right = is_right(scores / batch["option_chars"], item, is_answer)
            columns["correct_norm"] = zeros.index_add(0, item, right)
        if tokens is not None:
            columns["nll"] = zeros.index_add(0, item, torch.where(is_answer, -scores, 0))
            columns["tokens"] = zeros.index_add(0, item, (tokens * is_answer).to(zeros))
        if generated is not None:
            columns |= {"asked": torch.ones_like(zeros), "generated": generated.to(zeros)}
        table = torch.stack([columns.get(name, zeros) for name in _COUNTS], dim=1)  # (I, 7)
        task_of = torch.full_like(zeros, -1).long().scatter(0, item, task)  # (I,)
        real = task_of >= 0  # (I,)
        if self.items is not None:
            self.items.append(ItemTable(index, task_of[real], table[real]))
        rows = self._rows(index)
        sums = table.new_zeros(rows.stop - rows.start, len(_COUNTS))
        self.choices.update(rows, sums.index_add(0, task_of[real], table[real]))

    def compute(self) -> Results:
        """The counts of everything added, on all ranks."""
        plain, choices = self.plain.compute().tolist(), self.choices.compute().tolist()
        sets = []
        for index, (name, tasks) in enumerate(self.sets):
            counts = [Counts(*row) for row in choices[self._rows(index)]]
            sets.append(SetCounts(name, dict(zip(tasks, counts, strict=True)), *plain[index]))
        return Results(sets, self.groups)

    def _rows(self, index: int) -> slice:
        """The rows of a set's tasks."""
        start = sum(len(tasks) for _, tasks in self.sets[:index])
        return slice(start, start + len(self.sets[index][1]))


def is_right(scores: Tensor, item: Tensor, is_answer: Tensor) -> Tensor:
    """Returns 1 for options that are the answer and their item's first best, else 0, shape (B,).

    Args:
        scores: Score of every option, shape (B,).
        item: Index of its item, shape (B,).
        is_answer: Whether it is the right one, shape (B,).
    """
    count = int(item.max()) + 1
    best = scores.new_full((count,), -torch.inf).scatter_reduce(0, item, scores, "amax")[item]  # (B,)
    order = torch.arange(len(scores), device=item.device)
    tied = torch.where(scores >= best - TIE * best.abs(), order, len(scores))
    first = order.new_full((count,), len(scores)).scatter_reduce(0, item, tied, "amin")[item]  # (B,)
    return (is_answer & (order == first) & best.isfinite()).to(scores)
