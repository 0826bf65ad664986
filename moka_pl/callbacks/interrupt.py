"""Stops on Ctrl-C or SIGTERM after the current optimizer step, with everything saved."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from moka_pl.callbacks.checkpoints import RunCheckpoint, between_steps, is_trial
from moka_pl.training.checkpoint import LAST_NAME

#: With several processes, ranks check for an interrupt every this many optimizer steps.
_AGREE_EVERY = 10


class GracefulInterrupt(Callback):
    """On Ctrl-C or SIGTERM, finishes the optimizer step, writes ``last.ckpt`` and stops the run.

    Only a checkpoint between two optimizer steps can be resumed exactly. A second Ctrl-C stops at once. In a
    trial run (``fast_dev_run``), the first one does, and no file is written.
    """

    def __init__(self) -> None:
        self._asked = False
        self._saved: str | None = None
        self._old: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs the signal handlers."""
        if is_trial(trainer) or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._ask)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Saves the run between two optimizer steps, the same on all ranks."""
        # Asking the other ranks costs time.
        due = trainer.world_size == 1 or trainer.global_step % _AGREE_EVERY == 0
        if due and between_steps(trainer):
            self._save_if_asked(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Stops a saved run, now that the previous batch's metrics are logged."""
        self._stop_if_saved(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves and stops after a validation, whose results the last checkpoint lacks."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and between_steps(trainer):
            self._save_if_asked(trainer)
            self._stop_if_saved(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the signals back."""
        # Not in teardown: Lightning has by then put back the handlers from before its own.
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self.on_train_end(trainer, pl_module)

    def _save_if_asked(self, trainer: Trainer) -> None:
        asked = self._asked
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            self._saved = last_path(trainer)
            trainer.save_checkpoint(self._saved)

    def _stop_if_saved(self, trainer: Trainer) -> None:
        if self._saved is not None:
            rank_zero_info(
                f"\nInterrupted after step {trainer.global_step}; checkpoint saved in {self._saved}. "
                "To resume, add --ckpt_path last to the same command"
            )
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("\nStopping after this step (press Ctrl-C again to stop immediately) ...", flush=True)


def last_path(trainer: Trainer) -> str:
    """Returns the path of the run's ``last.ckpt``: beside its other checkpoints, if any."""
    saving = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    # Ours before the user's: ``--ckpt_path last`` looks there.
    saving.sort(key=lambda callback: not isinstance(callback, RunCheckpoint))
    folder = (
        saving[0].dirpath if saving else Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
    )
    return f"{folder}/{LAST_NAME}"  # not a Path: it may be a remote address
