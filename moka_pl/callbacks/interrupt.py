"""Ctrl-C and SIGTERM: stop at the next optimizer step with everything saved."""

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

#: In a run over several processes the ranks agree on stopping every so many optimizer steps.
_AGREE_EVERY = 10


class GracefulInterrupt(Callback):
    """Lets the optimizer step in progress end, writes the run's ``last.ckpt``, and then stops it.

    A checkpoint in the middle of an accumulated batch could not be continued exactly; one between two
    optimizer steps can. A second Ctrl-C stops at once, and the first one does in a trial (``fast_dev_run``),
    which leaves no file.
    """

    def __init__(self) -> None:
        self._asked = False
        self._saved: str | None = None
        self._old: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals for the time of training."""
        if is_trial(trainer) or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._ask)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Saves the run between two optimizer steps, on all ranks at the same one."""
        # The ranks agree on it now and then only.
        due = trainer.world_size == 1 or trainer.global_step % _AGREE_EVERY == 0
        if due and between_steps(trainer):
            self._save_if_asked(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Stops a run that was saved after the batch before: by now that one's metrics are logged, too."""
        self._stop_if_saved(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves again and stops after a validation: a resumed run would take what was saved before it."""
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
                f"\nInterrupted after step {trainer.global_step}; the run is saved in {self._saved}. "
                "Resume with the same command and --ckpt_path last"
            )
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("\nStopping after this step (press Ctrl-C again to stop at once) ...", flush=True)


def last_path(trainer: Trainer) -> str:
    """Returns where the run keeps its ``last.ckpt``: beside its own checkpoints, if it writes any."""
    saving = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    # Ours before the user's: ``--ckpt_path last`` looks there.
    saving.sort(key=lambda callback: not isinstance(callback, RunCheckpoint))
    folder = (
        saving[0].dirpath if saving else Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
    )
    return f"{folder}/{LAST_NAME}"  # not a Path: it may be a remote address
