"""A run of several processes, saved by the first of them when another one fails.

A rank that fails takes no more part in collectives: all others wait in one. Where the main thread waits, as
with gloo, the weights are those of the last step. So a thread of the first rank saves the run, once the rank
that fails has left a word in the store that has brought the processes together; and that rank waits until it
is done. Where the GPU waits (NCCL), the main thread is a step ahead of the weights: of such a moment there is
no checkpoint, and the run goes on from the last one.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from moka_pl._compat import dump_checkpoint, rendezvous_store

#: Seconds between two looks for a word, and that a rank which fails waits for the first one.
_EVERY, _PATIENCE = 0.5, 6.0
#: Seconds that a GPU has to come to the end of its last step, and between two looks.
_LAST_STEP, _LOOK = 2.0, 0.02

_UNSAVED = "\nThe first process is within a step, of which there is no checkpoint"
_LAST, _NOTHING = "; --ckpt_path last goes on from the last one", ", nor of an earlier one"

_fits = 0
_running: "FirstRank | None" = None


class FirstRank:
    """Saves a run when another rank fails.

    Args:
        trainer: The trainer of a run of several processes, in which all make one of these at the same time.
        save: Saves the run as of its last step, at least the given one; returns whether it did. It is called
            by a thread.
        has_last: Whether there is a checkpoint to go on from.
    """

    def __init__(self, trainer: Trainer, save: Callable[[int], bool], has_last: Callable[[], bool]) -> None:
        global _fits, _running
        _fits, _running = _fits + 1, self  # the store may know of an earlier fit's end
        self._failed, self._answered = f"moka_pl/failed/{_fits}", f"moka_pl/answered/{_fits}"
        self._store: Any = rendezvous_store()
        self._save, self._has_last, self._over = save, has_last, threading.Event()
        self._first, self._saying, self._said = trainer.is_global_zero, threading.Lock(), False
        if self._first:
            threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        with suppress(RuntimeError):  # the store is gone
            while not self._over.wait(_EVERY):
                if not self._store.check([self._failed]):
                    continue
                step, until = int(self._store.get(self._failed)), time.monotonic() + _PATIENCE
                while not (saved := self._saves(step)) and time.monotonic() < until:
                    if self._over.wait(_EVERY):
                        break
                self._say(saved)
                self._answer()
                return

    def _saves(self, step: int) -> bool:
        try:
            return self._save(step)
        except RuntimeError:  # of a GPU that has failed, as after a peer's memory was gone
            return False

    def _say(self, saved: bool) -> None:
        """Says once what there is to go on from, if it is not the last step.

        Whoever comes second waits: the process may end as soon as it goes on.
        """
        with self._saying:
            if not saved and not self._said and not self._over.is_set():
                rank_zero_info(_UNSAVED + (_LAST if self._has_last() else _NOTHING))
                self._said = True

    def _answer(self) -> None:
        self._store.set(self._answered, "")

    def fails(self, step: int) -> None:
        """Has the first rank save what it can: this one, or another one that waits until that is done.

        Args:
            step: The last step that this rank took part in.
        """
        with suppress(RuntimeError):
            if self._first:
                self._say(self._saves(step))
                self._answer()
                return
            self._store.set(self._failed, str(step))
            until = time.monotonic() + _PATIENCE
            while not self._store.check([self._answered]) and time.monotonic() < until:
                time.sleep(_EVERY / 5)

    def save_now(self) -> None:
        """Saves the run as of the last step that the first rank has come to."""
        if self._first and not self._over.is_set():
            self._say(self._saves(0))

    def give_up(self) -> None:
        """Says what there is to go on from where saving does not come to an end."""
        if self._first:
            self._say(saved=False)

    def end(self) -> None:
        """Ends the thread."""
        global _running
        self._over.set()
        _running = None


def save_now() -> None:
    """Saves the run that this process trains, if it is the first and another one is gone without a word."""
    if _running is not None:
        _running.save_now()


def give_up_saving() -> None:
    """Says what there is to go on from, of :func:`save_now` that does not come to an end."""
    if _running is not None:
        _running.give_up()


def copied_checkpoint(trainer: Trainer, since: Any) -> dict[str, Any] | None:
    """Returns a checkpoint in the host's memory, copied while the GPU may wait for other ranks.

    Args:
        trainer: The trainer.
        since: An event of the GPU's after the last change of the weights; None on a CPU. If the GPU does not
            come to it, as it waits for a rank that is gone, there is no checkpoint.
    """
    if not _reached(since):
        return None
    with _beside(trainer.strategy.root_device, since) as stream:
        found: dict[str, Any] = _copied(dump_checkpoint(trainer))
        if stream is not None:
            stream.synchronize()
    return found


def _reached(since: Any) -> bool:
    """Whether a GPU comes to an event soon; one that waits for a rank which is gone never does."""
    until = time.monotonic() + _LAST_STEP
    while since is not None and not since.query():
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK)
    return True


@contextmanager
def _beside(device: torch.device, since: Any) -> Iterator[Any]:
    """Runs the body on a stream of its own, which waits for an event only."""
    stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    if stream is not None and since is not None:
        stream.wait_event(since)
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        yield stream


def _copied(value: Any) -> Any:
    # Tensor by tensor, unlike ``host_copy``: where a GPU waits for another rank, no kernel should be needed.
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_copied(one) for one in value]
    return value


def moment(device: torch.device) -> Any:
    """Returns an event of the GPU's after all that it was told to compute; None on a CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
