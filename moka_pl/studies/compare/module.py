"""The module that runs are trained with: it takes a base that is there, and keeps every item's scores."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from moka_pl.backbone.load import Backbone
from moka_pl.evaluation.metrics import ItemTable
from moka_pl.evaluation.module import Batch
from moka_pl.evaluation.results import Counts
from moka_pl.lm.scoring import TokenScores, row_sums
from moka_pl.studies.compare.shared_base import SharedBase
from moka_pl.training.module import MokaModule


class ComparedModule(MokaModule):
    """A :class:`MokaModule` whose base is shared with other runs.

    Attributes:
        shared: Where the base comes from; None loads one.
        place: Where the base lies; None where the module does, which without a trainer is the CPU.
        batches: Digest of all training batches in their order, so that runs can be seen to have had the same.
        items: What every item of the last evaluation scored, in the order of the evaluation.
    """

    shared: SharedBase | None = None
    place: torch.device | None = None
    items: dict[str, list[Any]] | None = None
    _digest: Any = None

    def load_base(self) -> Backbone:
        """The shared base."""
        if self.shared is None:
            return super().load_base()
        return self.shared.get(self.backbone, self.place or self.device)

    def on_train_start(self) -> None:
        """Begins with no counted batches, too."""
        super().on_train_start()
        self._digest = hashlib.sha256()

    @property
    def batches(self) -> str:
        """Digest of the batches trained on."""
        assert self._digest is not None
        return str(self._digest.hexdigest())[:16]

    def prepare_batch(self, batch: Batch) -> Batch:
        """Notes a training batch, while it is still on the CPU."""
        if self.trainer.training and self._digest is not None:  # not those that a start is chosen by
            self._digest.update(batch["input_ids"].cpu().numpy().tobytes())
        return super().prepare_batch(batch)

    def _start_metrics(self) -> None:
        super()._start_metrics()
        assert self._metrics is not None
        self._metrics.items = []
        self._plain: list[Tensor] = []

    def _score(self, batch: Batch) -> TokenScores:
        scores = super()._score(batch)
        if "item" not in batch:
            rows = len(batch["input_ids"])
            tokens = torch.bincount(scores.row, minlength=rows)  # (B,)
            self._plain.append(torch.stack([row_sums(scores, rows).double(), tokens.double()], 1))  # (B, 2)
        return scores

    def _end_metrics(self, prefix: str) -> None:
        super()._end_metrics(prefix)
        assert self._metrics is not None
        self.items = columns(
            self._metrics.items or [], self._plain, [tasks for _, tasks in self._metrics.sets]
        )
        self._metrics.items, self._plain = None, []


def columns(choices: list[ItemTable], plain: list[Tensor], sets: list[list[str]]) -> dict[str, list[Any]]:
    """Lists by name, with an element an item.

    Args:
        choices: Multiple-choice items, by batch.
        plain: Summed negative log-likelihood and tokens of plain texts, by batch, (B, 2) each.
        sets: Names of the tasks of every evaluation set.

    Returns:
        ``task`` (empty for plain text), ``correct``, ``correct_norm``, ``nll`` (nats) and ``tokens``;
        fillers (texts without a token) are left out.
    """
    names = list(Counts.__dataclass_fields__)
    found: dict[str, list[Any]] = {"task": [], "correct": [], "correct_norm": [], "nll": [], "tokens": []}
    for batch in choices:
        found["task"] += [sets[batch.set][task] for task in batch.task.tolist()]
        for name in ("correct", "correct_norm", "tokens"):
            found[name] += batch.counts[:, names.index(name)].int().tolist()
        found["nll"] += [round(value, 5) for value in batch.counts[:, names.index("nll")].tolist()]
    for rows in plain:
        kept = rows[rows[:, 1] > 0]
        found["task"] += [""] * len(kept)
        found["nll"] += [round(value, 5) for value in kept[:, 0].tolist()]
        found["tokens"] += kept[:, 1].int().tolist()
    return found
