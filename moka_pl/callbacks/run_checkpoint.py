"""Lightning's checkpoints, so that ``last.ckpt`` is where a run ended and can be continued exactly."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from moka_pl.callbacks.checkpoints import is_trial
from moka_pl.training.resume import VERSION_KEY


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, with ``last.ckpt`` written at the end of every epoch and of the run, too.

    Lightning (2.6) itself writes nothing then where ``every_n_train_steps`` or ``train_time_interval`` is
    set, and nothing after the last validation where there are several in an epoch.

    The checkpoints remember the version of the run's logs, which a folder of the user's own does not tell.
    """

    _version: int | str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settles the folder, and takes down the version of the logs."""
        super().setup(trainer, pl_module, stage)
        self._version = trainer.logger.version if trainer.logger is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state and the version of the logs."""
        return super().state_dict() | {VERSION_KEY: self._version}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves every so many steps, but only between two of them, and after the last one."""
        # In a resumed run Lightning would save again in the middle of the first accumulated batch.
        if between_steps(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._save_end(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what is due after a validation, and after the last step again: now with its metrics."""
        super().on_validation_end(trainer, pl_module)
        self._save_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what is due, unless the run ends in the middle of the epoch, which by now counts as done."""
        if trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves a trial (``fast_dev_run``) without a file; Lightning would write one here."""
        if not is_trial(trainer):
            super().on_train_end(trainer, pl_module)

    def _save_end(self, trainer: Trainer) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or is_trial(trainer):
            return
        if trainer.should_stop or trainer.fit_loop.epoch_loop._is_training_done:
            saved = self._last_global_step_saved
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_global_step_saved = saved  # what is due at this step besides is still to be saved


def between_steps(trainer: Trainer) -> bool:
    """Whether the batch that has just ended completed an optimizer step."""
    return not trainer.fit_loop._should_accumulate()
