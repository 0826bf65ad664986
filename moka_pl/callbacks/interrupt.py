"""Ctrl-C and SIGTERM: stop at the next optimizer step with everything saved."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

#: In a run over several processes the ranks agree on stopping every so many optimizer steps.
_AGREE_EVERY = 10


class GracefulInterrupt(Callback):
    """Lets the optimizer step in progress end, writes ``checkpoints/last.ckpt``, and then stops the run.

    A checkpoint in the middle of an accumulated batch could not be continued exactly; one between two
    optimizer steps can. A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self._asked = False
        self._old: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals for the time of training."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._ask)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Stops between two optimizer steps, on all ranks at the same one."""
        if not between_steps(trainer):
            return
        asked = self._asked
        if trainer.world_size > 1:
            if trainer.global_step % _AGREE_EVERY:
                return
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "last.ckpt"
            trainer.save_checkpoint(path)
            rank_zero_info(
                f"\nInterrupted after step {trainer.global_step}; the run is saved in {path}. "
                "Go on with the same command and --ckpt_path last"
            )
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the signals back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("\nStopping after this step (press Ctrl-C again to stop at once) ...", flush=True)


def between_steps(trainer: Trainer) -> bool:
    """Whether the batch that has just ended completed an optimizer step."""
    return not trainer.fit_loop._should_accumulate()
