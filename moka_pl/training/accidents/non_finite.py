"""Steps whose loss or gradient is not finite: skipped, counted, named; a run of nothing else is ended."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moka_pl._compat import skip_on_device
from moka_pl.data.types import Batch
from moka_pl.errors import ConfigError, NonFiniteError
from moka_pl.ops.finite import non_finite_names
from moka_pl.training.accidents.naming import diagnosing, gathered, rows_clause
from moka_pl.training.accidents.spikes import LossSpikes
from moka_pl.training.launches import HostCopy
from moka_pl.utils import warn

if TYPE_CHECKING:
    from moka_pl.training.steps import TrainedModule


@dataclass
class _Step:
    """An optimizer step.

    Attributes:
        number: Its number, as in "after step n".
        batches: Its micro-batches on this rank.
        copy: Loss and norm of the gradient over all ranks, shape (2,).
        gradients: Names of the parameters whose gradient is not finite, if known.
    """

    number: int
    batches: list[Batch]
    copy: HostCopy
    gradients: list[str] = field(default_factory=list)

    @property
    def values(self) -> Tensor:
        """Loss and norm, for which it may have to wait."""
        return self.copy.read()


class NonFiniteSteps:
    """Skips the optimizer steps whose loss or gradient norm is not finite, the same on all ranks.

    A skipped step changes neither weights nor the optimizer's state; number and schedule go on. Optimizers
    that take a flag on the GPU (``fused: true``) are not waited for; their steps are named one step later.
    With 16-bit gradients, which a scaler expects to overflow, its own skips count once it cannot scale lower.

    Args:
        module: The module that is trained.
        patience: So many in a row end the run.
        spikes: Judges the steps that are finite.

    Attributes:
        numbers: The skipped steps.
        error: What ends the run.
        skipping: Whether the step at hand has been left without gradients.
        in_a_row: How many of the last steps were skipped without a finite one between them.
    """

    def __init__(self, module: "TrainedModule", patience: int, spikes: LossSpikes) -> None:
        if patience < 1:
            raise ConfigError(f"max_non_finite_steps must be at least 1, not {patience}")
        self._module, self._patience, self._spikes = module, patience, spikes
        self.begin()

    def begin(self) -> None:
        """Forgets an earlier fit."""
        self.numbers: list[int] = []
        self.error: NonFiniteError | None = None
        self.skipping = False
        self._batches: list[Batch] = []
        self.in_a_row = 0
        self._pending: _Step | None = None
        self._finite: Batch | None = None  # a batch of the last finite step
        self._spikes.begin()

    def add(self, batch: Batch) -> None:
        """Notes a micro-batch of the step at hand."""
        self._batches.append(batch)

    def check(self, optimizer: torch.optim.Optimizer, values: Tensor, copy: HostCopy) -> None:
        """Lets the optimizer step at hand do nothing if its loss or gradient is not finite.

        Args:
            optimizer: The optimizer, whose gradients are complete.
            values: Loss and norm of the gradient over all ranks, shape (2,).
            copy: The same on its way to the host.
        """
        self.settle()
        self.skipping = False
        trainer = self._module.trainer
        batches, self._batches = self._batches, []
        step = _Step(trainer.global_step + 1, batches, copy)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        waits = values.device.type != "cuda" or scaler is not None or self._spikes.rolls_back
        if not waits and skip_on_device(optimizer, ~torch.isfinite(values).all()):
            self._pending = step
            return
        if _is_finite(step):
            if self._judge(step, optimizer):
                self._leave_out(optimizer, scaler)
            return
        if scaler is not None and math.isfinite(step.values[0]) and scaler.get_scale() > 1:
            return  # the scaler skips it and lowers its scale
        named = self._module.named_parameters()
        step.gradients = non_finite_names({name: p.grad for name, p in named if p.grad is not None})
        self._leave_out(optimizer, scaler)
        self._judge(step, optimizer)

    def _leave_out(self, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
        """Lets the optimizer's next step change nothing."""
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            # Optimizers pass such parameters by. A scaler may still have to look at the gradients.
            if scaler is None:
                parameter.grad, self.skipping = None, True
            elif parameter.grad is not None:
                parameter.grad.fill_(math.nan)

    def raise_error(self) -> None:
        """Raises what ends the run, if anything does; called between two steps, on all ranks."""
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        """Judges the last step and the weights at the end of training.

        Raises:
            NonFiniteError: If the weights, or all of the steps, are not finite.
        """
        self.settle()
        trainer = self._module.trainer
        weights = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        if self.error is None and (bad := non_finite_names(weights)):
            self.error = NonFiniteError(
                f"the weights are not finite after the last step, {trainer.global_step} (first {bad[0]}). "
                f"They are not saved. {NON_FINITE_REMEDY}"
            )
        if self.error is None and self.numbers and self._finite is None:
            self.error = self._ending(f"none of the {len(self.numbers)} steps had a finite loss and gradient")
        self.raise_error()

    def settle(self) -> None:
        """Judges the step before, whose values have arrived by now."""
        step, self._pending = self._pending, None
        if step is not None:
            self._judge(step, self._module.trainer.optimizers[0])

    def _judge(self, step: _Step, optimizer: torch.optim.Optimizer) -> bool:
        """Judges a step; returns whether it is to be skipped though it is finite."""
        if _is_finite(step):
            self.in_a_row = 0
            self._finite = step.batches[0] if step.batches else self._finite
            return self._spikes.judge(step.number, float(step.values[0]), step.batches, optimizer)
        if self.numbers and self.numbers[-1] == step.number:  # LBFGS computes a step's loss several times
            return False
        self.numbers.append(step.number)
        self.in_a_row += 1
        loss, norm = step.values.tolist()
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient has the norm {norm}"
        where = gathered(self._module, self._find(step))
        # One such step may be its rows', several are the weights', which are kept where spikes are undone.
        undone = self._spikes.undo(optimizer) if self.in_a_row > 1 else ""
        warn(f"step {step.number} is skipped: its {what}{where}{undone}. Skipped so far: {len(self.numbers)}")
        if self.in_a_row >= self._patience:
            first = step.number - self.in_a_row + 1
            self.error = self._ending(
                f"the last {self.in_a_row} steps ({first} to {step.number}) had no finite loss or gradient"
            )
        return False

    def _ending(self, reason: str) -> NonFiniteError:
        """Makes the error, which tells whether the weights are worth saving."""
        usable = self._finite is not None and self._still_finite(self._finite)
        usable = self._module.trainer.strategy.reduce_boolean_decision(usable, all=True)
        kept = "The weights themselves give no finite loss now; what was saved before is kept"
        if usable:
            kept = "The weights of before are saved"
        elif self._finite is None:
            kept = "No step was finite, so nothing has been trained"
        return NonFiniteError(f"{reason}. {kept}. {NON_FINITE_REMEDY}", usable)

    def _still_finite(self, batch: Batch) -> bool:
        """Whether a batch that had a finite loss still has one."""
        with suppress(RuntimeError), diagnosing(self._module), torch.no_grad():
            return bool(torch.isfinite(self._module.token_scores(batch).nll.sum()))
        return False

    # Naming

    def _find(self, step: _Step) -> str:
        """Computes the step's batches again; returns the first layer and the rows that are not finite."""
        outputs: list[str] = []
        rows: list[str] = []
        with suppress(RuntimeError), diagnosing(self._module):  # such as a lack of memory
            for batch in step.batches:
                with _watched(self._module.causal_lm, outputs), torch.no_grad():
                    bad = ~torch.isfinite(self._module.token_scores(batch).nll)
                rows += self._module.named_rows(batch, bad.nonzero()[:, 0].tolist())
            if outputs or rows:
                layer = outputs[0] if outputs else "the head"
                return f"; first layer whose output is not finite: {layer}{rows_clause(rows)}"
            # Those of several ranks are averaged by now.
            gradients = step.gradients if self._module.trainer.world_size == 1 else []
            for batch in step.batches:
                for row in self._module.single_rows(batch):
                    names = self._bad_gradients(row)
                    gradients = gradients or names
                    rows += self._module.named_rows(row, [0]) if names else []
            if gradients:  # the backward pass comes from the last layer
                return f"; first layer whose gradient is not finite: {gradients[-1]}{rows_clause(rows)}"
        return "; computed again, it is finite" if self._module.trainer.world_size == 1 else ""

    def _bad_gradients(self, batch: Batch) -> list[str]:
        """Returns the parameters whose gradients of a batch are not finite."""
        named = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        loss = self._module.token_scores(batch).nll.sum()
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return non_finite_names(dict(zip(named, gradients, strict=True)))


NON_FINITE_REMEDY = (
    "Look at the rows that the warnings name, lower the learning rate, clip gradients "
    "(--trainer.gradient_clip_val 1), or compute in float32 (--model.backbone.compute_dtype float32)"
)


def _is_finite(step: _Step) -> bool:
    return bool(torch.isfinite(step.values).all())


@contextmanager
def _watched(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Notes the names of the layers whose outputs are not finite, in the order in which they are computed."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not names and non_finite_names(output):
                names.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
