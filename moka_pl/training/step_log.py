"""What steps log of values that the GPU computes, without waiting for it."""

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moka_pl._compat import log_metrics
from moka_pl.training.launches import HostCopy

if TYPE_CHECKING:
    from moka_pl.training.steps import TrainedModule


class _Step(NamedTuple):
    """A step that is not logged yet.

    Attributes:
        number: The number that Lightning logs it under, from 0.
        epoch: Its epoch.
        values: Its loss and norm of the gradient, (2,).
        rates: Its learning rates by tag.
    """

    number: int
    epoch: int
    values: HostCopy
    rates: Mapping[str, float]


class StepLog(Callback):
    """Logs loss, norm of the gradient and learning rates of steps, once the GPU has come to them.

    Lightning reads what it logs, and what the progress bar shows, at the end of the step. The host would wait
    for the GPU, and the GPU then for the host to launch the next step. So a step's values go to the loggers
    when the next one is launched, under the step's own number, or before a validation, a checkpoint, the end
    or an error. A step whose update has not come is none: a run that resumes will take it, and what a GPU
    waits for within it may never come. The progress bar shows the loss as ``loss``, on a GPU that of the step
    before.

    Args:
        module: The module that is trained.
    """

    def __init__(self, module: "TrainedModule") -> None:
        self._module = module
        self._step: _Step | None = None
        self._shown: float | None = None

    def add(self, values: HostCopy, rates: Mapping[str, float]) -> None:
        """Takes a step's values, before the optimizer's update.

        Args:
            values: Its loss and norm of the gradient, (2,).
            rates: Its learning rates by tag.
        """
        trainer = self._module.trainer
        self._flush(trainer)  # LBFGS comes several times, and its last values count
        self._step = _Step(trainer.global_step, trainer.current_epoch, values, rates)
        if values.arrived:
            self._shown = float(values.read()[0])
        if self._shown is not None:
            self._module.log("loss", torch.tensor(self._shown), prog_bar=True, logger=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an earlier fit."""
        self._step = self._shown = None

    def on_train_batch_end(self, trainer: Trainer, *of_batch: Any) -> None:
        """Logs a step whose values are there, as on a CPU."""
        if self._step is not None and self._step.values.arrived:
            self._flush(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the last step before the validation's results."""
        self._flush(trainer)

    on_train_end = on_validation_start

    def on_save_checkpoint(self, trainer: Trainer, *of_checkpoint: Any) -> None:
        """Logs the last step, with which a resumed run begins."""
        self._flush(trainer)

    def on_exception(self, trainer: Trainer, *of_exception: Any) -> None:
        """Logs the last step, unless the GPU does not answer any more."""
        with suppress(RuntimeError):
            self._flush(trainer)

    def _flush(self, trainer: Trainer) -> None:
        """Logs a step that is complete."""
        step = self._step
        if step is None or step.number >= trainer.global_step:
            return
        self._step = None
        loss, norm = step.values.read().tolist()
        self._shown = loss
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or ((step.number + 1) % every and not trainer.should_stop):
            return
        values = {"train/loss": loss, "train/grad_norm": norm, **step.rates, "epoch": step.epoch}
        log_metrics(trainer, values, step.number)
