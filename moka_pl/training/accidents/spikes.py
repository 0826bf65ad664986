r"""Steps whose loss is far above the others': named, and undone if wanted.

With the median m of the last 100 losses, s = 1.4826 times the median of ``|ℓ_i - m|``, which is the standard
deviation of normal ones, and s' the same of their logarithms, the loss ℓ of a step is a spike if

.. math::
    \ell > m + k \max(s, 0.05\,m, 0.05) \quad\text{and}\quad
    \ln \ell > \ln m + \tfrac{5}{6} k \max(s', 0.05)

for a threshold k, unless four of those 100 losses were as high: then it is the data's own level. Losses of
small batches are skewed, which the logarithm takes care of. Both medians belong to robust statistics: a few
spikes do not move them.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim import Optimizer

from moka_pl.data.types import Batch
from moka_pl.errors import ConfigError, listed
from moka_pl.lm.scoring import IGNORE_INDEX
from moka_pl.training.accidents.naming import diagnosing, gathered
from moka_pl.training.accidents.snapshot import Snapshot
from moka_pl.utils import warn

if TYPE_CHECKING:
    from moka_pl.training.steps import TrainedModule

#: Losses that a step's is compared with; fewer than the least are too few.
_WINDOW, _LEAST = 100, 20
#: So many losses as high are no accident.
_COMMON = 4
#: Of normal losses, the standard deviation in units of the median deviation.
_NORMAL = 1.4826
_SMALLEST_SHARE, _SMALLEST, _LOG_SHARE = 0.05, 0.05, 5 / 6
#: Rows that a message numbers.
_NUMBERED = 8


@dataclass
class SpikeOptions:
    """Which losses of steps are spikes, and what is done about them.

    Args:
        threshold: A loss is a spike if it is this many robust standard deviations above the running median;
            null turns this off.
        rollback_every: 0 only warns. With N, adapter and optimizer are copied to host memory at least every N
            steps without a spike; a spike's step is skipped and the copy is put back. The step count and the
            learning-rate schedule go on. The CPU then waits for each step's loss.
    """

    threshold: float | None = 6.0
    rollback_every: int = 0

    def __post_init__(self) -> None:
        """Refuses values that cannot work."""
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise ConfigError(f"loss_spikes.threshold must be above 0, or null, not {self.threshold}")
        if self.rollback_every < 0:
            raise ConfigError(f"loss_spikes.rollback_every must be 0 or more, not {self.rollback_every}")
        if self.rollback_every and self.threshold is None:
            raise ConfigError(
                f"loss_spikes.rollback_every is {self.rollback_every}, but with threshold null no loss is a "
                "spike; set loss_spikes.threshold, such as 6"
            )


class LossSpikes:
    """Names the steps whose loss is a spike, and goes back to the weights of before if wanted.

    The loss is that of all ranks, so that all of them decide alike. It is that of the weights before the
    step: a state is kept once the next loss has shown that it is good.

    Args:
        module: The module that is trained.
        options: The options.

    Attributes:
        numbers: The steps that were spikes.
    """

    def __init__(self, module: "TrainedModule", options: SpikeOptions) -> None:
        self._module, self._options = module, options
        self.begin()

    @property
    def rolls_back(self) -> bool:
        """Whether a spike is undone, for which a step's loss has to be known before its update."""
        return self._options.rollback_every > 0

    def check(self) -> None:
        """Refuses to undo steps that a scaler has looked at already: it would let the optimizer go on."""
        scaler = getattr(self._module.trainer.precision_plugin, "scaler", None)
        if self.rolls_back and scaler is not None:
            raise ConfigError(
                f"loss_spikes.rollback_every is {self._options.rollback_every}, which does not go with "
                "--trainer.precision 16-mixed; use bf16-mixed"
            )

    def begin(self) -> None:
        """Forgets an earlier fit."""
        self.numbers: list[int] = []
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._judged = 0
        self._good: Snapshot | None = None

    def judge(self, number: int, loss: float, batches: Sequence[Batch], optimizer: Optimizer) -> bool:
        """Judges a step with a finite loss; returns whether it is to be skipped, all being undone.

        Args:
            number: Its number.
            loss: Its loss, over all ranks.
            batches: Its micro-batches on this rank.
            optimizer: The optimizer, which has not updated yet if spikes are undone.
        """
        if self._options.threshold is None:
            return False
        if number == self._judged:  # LBFGS computes a step's loss several times
            return self.rolls_back and number in self.numbers[-1:]
        self._judged = number
        spike = is_spike(loss, self._losses, self._options.threshold)
        median = statistics.median(self._losses) if spike else 0.0
        self._losses.append(loss)
        if not spike:
            self._keep(number - 1, optimizer)
            return False
        self.numbers.append(number)
        then = ""
        if self.rolls_back:
            then = f". It is skipped{self.undo(optimizer)}"
        rows = gathered(self._module, self._find(batches))
        warn(
            f"step {number}: the loss of {loss:.3g} is a spike, the running median is {median:.3g}"
            f"{rows}{then}"
        )
        return self.rolls_back

    def undo(self, optimizer: Optimizer) -> str:
        """Puts the last good weights back, if any are kept; returns the end of a sentence that says so."""
        if self._good is None:
            return ""
        self._good.restore(self._module, optimizer)
        return f", and weights and optimizer are those after step {self._good.step} again"

    def state_dict(self) -> dict[str, Any]:
        """Returns what the judgement of later steps depends on."""
        good = None if self._good is None else self._good._asdict()
        return {"losses": list(self._losses), "good": good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state; another ``rollback_every`` than its run's takes effect from here on."""
        self._losses.extend(state["losses"])
        if self.rolls_back and state["good"] is not None:
            self._good = Snapshot(**state["good"])

    def _keep(self, step: int, optimizer: Optimizer) -> None:
        """Keeps the weights of a step, unless those of a recent one are kept."""
        every = self._options.rollback_every
        if every and (self._good is None or step - self._good.step >= every):
            self._good = Snapshot.of(step, self._module, optimizer)

    def _find(self, batches: Sequence[Batch]) -> str:
        """Computes the step's batches again; names its rows, that of the highest loss first."""
        rows: list[_Row] = []
        with suppress(RuntimeError), diagnosing(self._module), torch.no_grad():  # such as a lack of memory
            for batch in batches:
                rows += _row_losses(self._module, batch)
        if not rows:
            numbers = [str(number) for batch in batches for number in batch.get("rows", [])]
            return f"; rows {listed(numbers, _NUMBERED)}" if numbers else ""
        rows.sort(key=lambda row: -row.loss)
        text = self._module.named_rows(rows[0].batch, [rows[0].token])[0]
        if rows[0].number is None:
            return f"; the row of the highest loss ({rows[0].loss:.3g}) is {text}"
        numbers = [f"{row.number} (loss {row.loss:.3g})" for row in rows]
        return f"; rows {listed(numbers, _NUMBERED)}; the first is {text}"


class _Row(NamedTuple):
    """A row of a batch.

    Attributes:
        loss: The mean loss of its tokens.
        number: Its number in the training data, if known.
        batch: The batch.
        token: The index of its first scored token.
    """

    loss: float
    number: int | None
    batch: Batch
    token: int


def is_spike(loss: float, before: Sequence[float] | deque[float], threshold: float) -> bool:
    """Whether a loss is a spike after the last ones, by the equation above.

    Args:
        loss: The loss.
        before: The losses of the steps before it, at most ``_WINDOW``.
        threshold: k.
    """
    if len(before) < _LEAST:
        return False
    median = statistics.median(before)
    if loss <= median + threshold * max(_SMALLEST_SHARE * median, _SMALLEST):
        return False  # mostly
    spread = _NORMAL * statistics.median(abs(one - median) for one in before)
    bound = median + threshold * max(spread, _SMALLEST_SHARE * median, _SMALLEST)
    logs = [math.log(max(one, 1e-12)) for one in before]
    middle = statistics.median(logs)
    spread = _NORMAL * statistics.median(abs(one - middle) for one in logs)
    # Large spreads overflow: nothing is a spike then.
    exponent = middle + _LOG_SHARE * threshold * max(spread, _SMALLEST)
    bound = max(bound, math.exp(exponent) if exponent < 700 else math.inf)
    return loss > bound and sum(one > bound for one in before) < _COMMON


def _row_losses(module: "TrainedModule", batch: Batch) -> list[_Row]:
    """Computes the mean loss of each row, or example of a packed row, that trains something."""
    nll = module.token_scores(batch).nll.double().cpu()  # (N,)
    labels = batch["labels"].cpu()
    if labels.ndim == 1:  # images, each of which has one label
        return [_Row(loss, None, batch, number) for number, loss in enumerate(nll.tolist())]
    row, column = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)  # (N,)
    rows, tokens = labels.shape
    starts = torch.arange(rows + 1) * tokens  # (B + 1,)
    if "segment_starts" in batch:
        starts = batch["segment_starts"].cpu().long()  # (S + 1,)
    segment = torch.bucketize(row * tokens + column + 1, starts, right=True)  # (N,)
    found, index, counts = torch.unique(segment, return_inverse=True, return_counts=True)  # (R,), (N,), (R,)
    means = torch.zeros(len(found), dtype=torch.float64).index_add_(0, index, nll) / counts  # (R,)
    firsts = counts.cumsum(0) - counts  # (R,): tokens are in the order of their rows
    numbers: list[int | None] = list(batch.get("rows", []))
    if len(numbers) != len(found):
        numbers = [None] * len(found)
    return [
        _Row(loss, number, batch, token)
        for loss, number, token in zip(means.tolist(), numbers, firsts.tolist(), strict=True)
    ]
