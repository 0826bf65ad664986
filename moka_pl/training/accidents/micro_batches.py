"""Micro-batches in parts where the memory does not hold them, with the gradient of the whole."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from moka_pl.data.types import Batch
from moka_pl.evaluation.memory import Halving
from moka_pl.training.accidents.memory import step_error
from moka_pl.training.sharding.strategy import ShardedStrategy

if TYPE_CHECKING:
    from moka_pl.training.steps import TrainedModule


class MicroBatches:
    r"""Computes micro-batches, and those that do not fit in parts of half as many rows.

    The loss of a step is a sum over tokens until all of its batch is known, so its gradient is the sum of
    those of parts, ``∇ Σ_i ℓ_i = Σ_parts ∇ Σ_{i in part} ℓ_i``. A part counts only once its backward pass is
    through, and a failed one leaves nothing behind, nor in the random generators. What fits is remembered for
    batches of rows as long, or longer.

    On several ranks each one halves as it must. They do not wait for each other in a pass: gradients are
    summed over the ranks once, before the optimizer's step. Ranks of a sharded base ask each other for every
    block, as in an evaluation, so that each may begin again.

    Args:
        module: The module that is trained.
    """

    def __init__(self, module: "TrainedModule") -> None:
        self._module = module
        self._halvings: dict[int, _HalvedRows] = {}  # by the tokens of a row
        self._told: set[int] = set()
        self._params = [p for p in module.parameters() if p.requires_grad]
        self._sums: list[Tensor] = []
        self._used: list[bool] = []
        wrapped = module.trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = False  # as in its ``no_sync``

    def compute(self, batch: Batch, first: bool) -> tuple[Tensor, int]:
        """Computes the gradient of a micro-batch, which :meth:`add_gradients` then adds.

        Args:
            batch: The micro-batch, of B rows of T tokens.
            first: Whether it is the first one of its step, so that older gradients are of no use.

        Returns:
            Its summed negative log-likelihood and the number of its predicted tokens.
        """
        if first:
            for parameter in self._params:
                parameter.grad = None
        rows, tokens = batch["input_ids"].shape
        halving = self._halving(tokens)
        halving.batch = batch
        self._sums = [torch.zeros_like(p) for p in self._params]
        self._used = [False] * len(self._params)
        parts = halving.parts(rows, lambda part: self._compute(batch, part))
        strategy = self._module.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            strategy.serve()  # others may need more parts
        return torch.stack([total for total, _ in parts]).sum(), sum(count for _, count in parts)

    def add_gradients(self) -> None:
        """Adds the gradient of the last micro-batch to the parameters'."""
        for parameter, total, used in zip(self._params, self._sums, self._used, strict=True):
            if used and parameter.grad is None:
                parameter.grad = total
            elif used and parameter.grad is not None:
                parameter.grad.add_(total)
        self._sums, self._used = [], []

    def sum_over_ranks(self) -> None:
        """Averages gradients over all ranks, as ``DistributedDataParallel`` does."""
        ranks = self._module.trainer.world_size
        waiting = []
        for parameter in self._params:
            if parameter.grad is None:  # unused here, but perhaps not elsewhere
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.div_(ranks)
            waiting.append(torch.distributed.all_reduce(parameter.grad, async_op=True))
        for work in waiting:
            work.wait()

    def state_dict(self) -> dict[str, int]:
        """Returns how many rows fit at a time, by the tokens of a row."""
        return {str(tokens): h.most for tokens, h in self._halvings.items() if h.most is not None}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores what fits."""
        for tokens, most in state.items():
            self._halving(int(tokens)).most = most

    def _halving(self, tokens: int) -> "_HalvedRows":
        halving = self._halvings.setdefault(tokens, _HalvedRows(self._module, self._told))
        shorter = [h.most for size, h in self._halvings.items() if size <= tokens and h.most is not None]
        halving.most = min(shorter, default=None)
        return halving

    def _compute(self, batch: Batch, part: slice) -> tuple[Tensor, int]:
        """Adds the gradient of some rows to the sums."""
        module, trainer = self._module, self._module.trainer
        on_gpu = module.device.type == "cuda"
        states = torch.get_rng_state(), torch.cuda.get_rng_state(module.device) if on_gpu else None
        try:
            nll = module.token_scores(rows_of(batch, part)).nll  # (N,)
            total = nll.sum()
            # As Lightning divides, and a scaler multiplies, what is differentiated at once.
            loss = total / trainer.accumulate_grad_batches
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            loss = loss if scaler is None else scaler.scale(loss)
            gradients = torch.autograd.grad(loss, self._params, allow_unused=True)
        except (RuntimeError, MemoryError):
            torch.set_rng_state(states[0])
            if states[1] is not None:
                torch.cuda.set_rng_state(states[1], module.device)
            raise
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                self._sums[index].add_(gradient)
                self._used[index] = True
        return total.detach(), nll.numel()


class _HalvedRows(Halving):
    """Rows of a micro-batch; what does not fit ends the run as elsewhere in a step.

    Args:
        module: The module that is trained.
        told: Numbers of rows at a time that were told.
    """

    batch: Batch

    def __init__(self, module: "TrainedModule", told: set[int]) -> None:
        super().__init__("rows", "")
        self._module, self._told = module, told

    def failure(self, reason: str) -> Exception:
        """Makes the error of one row that does not fit."""
        return step_error(self._module, "one row", rows_of(self.batch, slice(0, 1)), reason)

    def said(self, before: int) -> str:
        """Returns how the run goes on, once for each number of rows."""
        if self.most is None or self.most in self._told:
            return ""
        self._told.add(self.most)
        tokens = self.batch["input_ids"].shape[1]
        return (
            f"with a micro-batch of {before} x {tokens:,} tokens; what does not fit is computed {self.most} "
            "rows at a time from here on, with the same gradient"
        )


def rows_of(batch: Batch, part: slice) -> Batch:
    """Returns some rows of a batch, as far as their scores need it.

    Args:
        batch: Plain or packed rows, or options.
        part: Which rows.
    """
    if part.stop - part.start >= len(batch["input_ids"]):
        return batch
    found: dict[str, Any] = {name: batch[name][part] for name in ("input_ids", "labels")}
    if "position_ids" in batch:
        tokens, starts = batch["input_ids"].shape[1], batch["segment_starts"]  # each row begins a segment
        begin, end = part.start * tokens, min(part.stop, len(batch["input_ids"])) * tokens
        found["position_ids"] = batch["position_ids"][part]
        found["segment_starts"] = starts[(starts >= begin) & (starts <= end)] - begin
        found["longest_segment"] = batch["longest_segment"]
    return found  # type: ignore[return-value]
