"""Stops on Ctrl-C or another signal after the current optimizer step, and saves a run that fails."""

import contextlib
import os
import signal
import stat
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from moka_pl._compat import without_sigterm_broadcast, without_sigterm_notifier
from moka_pl.callbacks.checkpoints import AdapterCheckpoint, last_path
from moka_pl.errors import MokaError, NonFiniteError, terminate
from moka_pl.training.accidents import requeue
from moka_pl.training.accidents.first_rank import FirstRank, copied_checkpoint, moment
from moka_pl.training.accidents.memory import StepMemoryError, release
from moka_pl.training.checkpoint import rng_state, set_rng_state
from moka_pl.training.launches import AnyRank
from moka_pl.training.trainer_state import between_steps, in_training, is_last_step, is_trial
from moka_pl.training.writing.whole_files import finish_writing
from moka_pl.utils import ENDING

#: With several processes, ranks check for an interrupt every this many optimizer steps.
_AGREE_EVERY = 10
#: Seconds without a batch after which a loader counts as stuck, once a run is asked to stop.
_STUCK_AFTER = 10.0

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", *ENDING) if hasattr(signal, name)]


class GracefulInterrupt(Callback):
    """On Ctrl-C, SIGTERM, SIGHUP or SIGUSR1, finishes the optimizer step, writes ``last.ckpt`` and stops.

    Only a checkpoint between two optimizer steps can be resumed exactly. A second Ctrl-C stops at once. In a
    trial run (``fast_dev_run``), the first one does, and no file is written. After the last step the run ends
    as it would without: nothing is left to be resumed. A signal that somebody else handles is left to them:
    under ``nohup`` SIGHUP is still ignored. A job of SLURM that is told to end by SIGUSR1 (``#SBATCH --signal
    USR1@90``) is put back in the queue, and goes on when it is started again.

    A run that fails, such as by a loader's error or a lack of memory, writes it, too, as of its last step.

    Attributes:
        asked: Whether a signal has asked for the end.
    """

    def __init__(self) -> None:
        self.asked = False
        self._saved: str | None = None
        self._kept, self._last = "", ""
        self._old: dict[int, Any] = {}
        self._process = os.getpid()
        self._begun_at = 0
        self._trainer: Trainer | None = None
        self._told_last = False
        self._looking = threading.Event()
        self._over = threading.Event()
        self._stuck = False
        self._position: _Position | None = None
        self._rewinds = False
        self._first_rank: FirstRank | None = None
        self._saving = threading.Lock()
        self._question: AnyRank | None = None
        self._undo = contextlib.ExitStack()
        self._requeue_signal: int | None = None
        self._requeues = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keeps Lightning's handlers of signals from waiting for other ranks, and from requeueing a job."""
        self._requeue_signal = requeue.take_over(trainer) or self._requeue_signal
        if trainer.world_size > 1:
            without_sigterm_notifier(trainer, terminate)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs the signal handlers."""
        self._begun_at, self._trainer, self._process = trainer.global_step, trainer, os.getpid()
        self._over.clear()
        if not is_trial(trainer):
            self._last = last_path(trainer)  # on all ranks, which may ask each other for it
        if trainer.world_size > 1 and not is_trial(trainer):
            self._first_rank = FirstRank(
                trainer,
                save=lambda step: self._save_alone(trainer, pl_module, step),
                has_last=lambda: "://" in self._last or Path(self._last).is_file(),
            )
        if is_trial(trainer) or threading.current_thread() is not threading.main_thread():
            return
        if self._requeue_signal is not None and trainer.is_global_zero and "://" not in self._last:
            requeue.sign(Path(self._last).parent)
        signals = {*_SIGNALS} if self._requeue_signal is None else {*_SIGNALS, self._requeue_signal}
        for number in signals:
            if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) in (
                signal.SIG_DFL,
                terminate,  # there was nothing to save before
            ):
                self._old[number] = signal.signal(number, self._ask)
        if trainer.world_size > 1:  # the ranks agree on SIGTERM by :meth:`_any_asked`
            self._undo.enter_context(without_sigterm_broadcast(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Saves the run between two optimizer steps, the same on all ranks."""
        self._note_position(trainer, pl_module)
        if is_last_step(trainer):
            self._say_last()
        elif between_steps(trainer) and self._any_asked(trainer, pl_module.device):
            self._save(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Stops a saved run, now that the previous batch's metrics are logged."""
        self._stop_if_saved(trainer)
        self._wait_for_workers()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves and stops after a validation, whose results the last checkpoint lacks."""
        if not in_training(trainer) or is_last_step(trainer):
            return
        if between_steps(trainer):
            self._note_position(trainer, pl_module)
            self._save_if_asked(trainer, pl_module.device)
            self._stop_if_saved(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the signals back."""
        # Not in teardown: Lightning has by then put back the handlers from before its own.
        self._over.set()
        self._undo.close()
        self._question = None
        if self._first_rank is not None:
            self._first_rank.end()
            self._first_rank = None
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says that a run which was asked to stop is complete, and where its adapter is."""
        if self.asked:
            savers: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            paths = [c.last_path for c in savers if isinstance(c, AdapterCheckpoint) and c.last_path]
            place = "".join(f"; its adapter is {path}" for path in paths)
            rank_zero_info(f"\nTraining was complete after step {trainer.global_step}{place}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves what can be resumed, and gives the signals back."""
        if isinstance(exception, StepMemoryError):
            release(exception)
        if self._resumable(trainer, pl_module, exception):
            # The run's own error says more than what else goes wrong.
            with contextlib.suppress(MokaError, OSError):
                self._save(trainer)
                rank_zero_info(self._ending("Ended", trainer))
        elif self._first_rank is not None and self._fails_alone(trainer, exception):
            step = trainer.global_step + bool(getattr(pl_module, "updating", False))
            self._first_rank.fails(step)
        if self._requeues and self._saved is not None and trainer.is_global_zero:
            with contextlib.suppress(MokaError, OSError):
                finish_writing(trainer)
            rank_zero_info(requeue.requeue())
        self.on_train_end(trainer, pl_module)
        if self.asked and self._saved is not None and not isinstance(exception, KeyboardInterrupt):
            raise KeyboardInterrupt from exception  # the signal went to the loader's workers, too

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Puts the position after the last step into the checkpoint of a run that fails within the next."""
        if self._rewinds and self._position is not None:
            checkpoint["loops"]["fit_loop"] = self._position.loop
            checkpoint["epoch"] = self._position.epoch

    def _fails_alone(self, trainer: Trainer, exception: BaseException) -> bool:
        """Whether a rank of several may fail for itself."""
        usual = isinstance(exception, KeyboardInterrupt | NonFiniteError)
        return trainer.state.fn == "fit" and not is_trial(trainer) and not trainer.validating and not usual

    def _save_alone(self, trainer: Trainer, pl_module: LightningModule, step: int) -> bool:
        """Saves a run of several ranks on the first one alone, if its weights are those of a step.

        Args:
            trainer: The trainer.
            pl_module: Its module.
            step: The step that it must have come to.
        """
        with self._saving, contextlib.suppress(MokaError, OSError):
            position = self._position
            if self._saved is not None or position is None or position.step < max(step, self._begun_at + 1):
                return self._saved is not None
            with contextlib.suppress(MokaError, OSError):  # this process may be ended soon
                finish_writing(trainer)

            def unchanged() -> bool:
                updating = getattr(pl_module, "updating", False)
                return position is self._position and position.step == trainer.global_step and not updating

            if not unchanged():
                return False
            self._rewinds = True
            try:
                set_rng_state(position.rng, pl_module.device, 0)
                checkpoint = copied_checkpoint(trainer, position.event)
                if checkpoint is not None and unchanged():  # still, after the copy
                    trainer.strategy.save_checkpoint(checkpoint, self._last)
                    self._saved, self._kept = self._last, f"checkpoint saved in {self._last}"
                    rank_zero_info(self._ending("Ended", trainer))
            finally:
                self._rewinds = False
        return self._saved is not None

    def _note_position(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes where the run is, if it is between two steps and might be saved when the next one fails."""
        if trainer.is_global_zero and not is_trial(trainer) and between_steps(trainer):
            loop, rng = trainer.fit_loop.state_dict(), rng_state(pl_module.device)
            since = moment(pl_module.device) if trainer.world_size > 1 else None
            self._position = _Position(trainer.global_step, trainer.current_epoch, loop, rng, since)

    def _resumable(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> bool:
        """Whether there are steps that no checkpoint holds, and the weights are those of the last one."""
        if trainer.state.fn != "fit" or is_trial(trainer) or self._saved is not None:
            return False
        if isinstance(exception, KeyboardInterrupt) and not self._stuck:
            return False  # at once, as was asked
        if isinstance(exception, NonFiniteError):  # raised by all ranks alike
            if not exception.usable:
                return False
        elif trainer.world_size > 1 or trainer.validating:
            return False
        if trainer.global_step <= self._begun_at or getattr(pl_module, "updating", False):
            return False
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if 0 < batches.ready == batches.processed and between_steps(trainer):
            return True
        position = self._position if trainer.world_size == 1 else None
        self._rewinds = position is not None and position.step == trainer.global_step
        if position is not None and self._rewinds:
            set_rng_state(position.rng, pl_module.device, trainer.global_rank)
        return self._rewinds

    def _any_asked(self, trainer: Trainer, device: torch.device) -> bool:
        """Whether a rank is asked to end; several agree every few steps, and those of GPUs a step later."""
        if trainer.world_size == 1:
            return self.asked
        if self._question is None and trainer.global_step % _AGREE_EVERY == 0:
            self._question = AnyRank(self.asked, device)
            if device.type == "cuda":
                return False
        question, self._question = self._question, None
        return question is not None and question.answer()

    def _save_if_asked(self, trainer: Trainer, device: torch.device) -> None:
        """Saves a run whose ranks are all here, if one of them is asked to end."""
        if self.asked if trainer.world_size == 1 else AnyRank(self.asked, device).answer():
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        """Writes the checkpoint, unless it would hold a NaN or an infinity."""
        if self._requeue_signal is not None and trainer.world_size > 1:  # some may have had the signal later
            self._requeues = AnyRank(self._requeues, trainer.strategy.root_device).answer()
        path = self._saved = self._last
        try:
            trainer.save_checkpoint(path, weights_only=False)
            self._kept = f"checkpoint saved in {path}"
        except NonFiniteError as error:
            self._kept = str(error)

    def _stop_if_saved(self, trainer: Trainer) -> None:
        if self._saved is not None:
            rank_zero_info(self._ending("Interrupted", trainer))
            raise KeyboardInterrupt

    def _ending(self, how: str, trainer: Trainer) -> str:
        resume = "" if self._requeues else f". {requeue.RESUME}"
        return f"\n{how} after step {trainer.global_step}; {self._kept}{resume}"

    # Signals

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of a loader, which has inherited this handler
            return
        if self._looking.is_set():
            self._looking.clear()
            if _in_loader(frame):
                self._stuck = True
                raise KeyboardInterrupt
            return
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal()
        if self.asked:
            # Schedulers and closed terminals send more than one; only a second Ctrl-C is in a hurry.
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.asked, self._requeues = True, number == self._requeue_signal
        if self._trainer is not None and is_last_step(self._trainer):
            self._say_last()
            return
        if hasattr(signal, "pthread_kill"):
            threading.Thread(target=self._watch_loader, args=[threading.get_ident()], daemon=True).start()
        self._say("\nStopping after this step (press Ctrl-C again to stop immediately) ...")

    def _say_last(self) -> None:
        if self.asked and not self._told_last:
            self._told_last = True
            self._say("\nThe last step: the run ends as usual (press Ctrl-C again to stop immediately) ...")

    def _say(self, text: str) -> None:
        """Prints a line within a signal's handler, on the first rank."""
        if self._trainer is None or self._trainer.is_global_zero:
            with contextlib.suppress(
                OSError, RuntimeError, ValueError
            ):  # in the middle of printing, or closed
                print(text, flush=True)

    def _watch_loader(self, main: int) -> None:
        """Has the main thread look whether it waits in a loader that is stuck: no step would ever end."""
        assert self._trainer is not None
        progress = self._trainer.fit_loop.epoch_loop.batch_progress.total
        seen = -1
        while not self._over.wait(_STUCK_AFTER):
            if progress.ready == seen and not self._over.is_set():
                self._looking.set()
                signal.pthread_kill(main, signal.SIGINT)
            seen = progress.ready

    def _wait_for_workers(self) -> None:
        """Has a loader's dead worker noticed where its batch is waited for, not in the middle of a step."""
        number = getattr(signal, "SIGCHLD", None)
        if number is None or not self._old:
            return
        handler = signal.getsignal(number)
        if callable(handler) and number not in self._old:  # PyTorch's, which raises an error

            def look(number: int, frame: FrameType | None) -> None:
                if _in_loader(frame):
                    handler(number, frame)

            self._old[number] = signal.signal(number, look)


class _Position(NamedTuple):
    """Where a run is after an optimizer step.

    Attributes:
        step: The number of steps.
        epoch: The epoch.
        loop: The state of Lightning's loops and of the loader.
        rng: The states of the random generators.
        event: The GPU's event after the step, on several ranks.
    """

    step: int
    epoch: int
    loop: dict[str, Any]
    rng: dict[str, Any]
    event: Any


def _in_loader(frame: FrameType | None) -> bool:
    """Whether a frame waits for a batch of a PyTorch loader."""
    while frame is not None:
        if (
            frame.f_code.co_name == "__next__"
            and frame.f_globals.get("__name__") == "torch.utils.data.dataloader"
        ):
            return True
        frame = frame.f_back
    return False


def _leave_terminal() -> None:
    """Sends what is printed from now on nowhere, if the terminal is gone: printing would fail."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            number = stream.fileno()
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
