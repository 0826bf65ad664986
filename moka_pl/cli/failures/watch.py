"""Ends this process when another one of its run has ended, whatever this one waits for.

It has some time to find out by itself and to end with an error: where it waits for gloo it does. Where its
GPU waits for another one (NCCL) it does not, nor does it heed a signal.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from moka_pl._compat import without_process_observer
from moka_pl.cli.failures import ranks
from moka_pl.errors import printable
from moka_pl.training.accidents.lifeline import LOST, Ended, Lifeline

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

#: Seconds between two looks; that an error of a connection waits for what the look finds.
_EVERY, _HEARING = 0.5, 1.5
#: Seconds that a process has to end by itself; then to save the run, if it is the first; then to tell why.
_GRACE, _SAVING, _TELLING = 8.0, 12.0, 3.0

_watch: "_Watch | None" = None
_runs = 0


def begin(trainer: "Trainer") -> None:
    """Watches over the processes that a trainer starts, or that run beside this one."""
    global _watch, _runs
    end(0)
    if trainer.world_size > 1:
        _runs += 1
        _watch = _Watch(trainer)
        _watch.start()


def heard() -> Ended | None:
    """Which process has ended before this one, for one that has lost a connection; None if unknown."""
    if _watch is not None:
        _watch.found.wait(_HEARING)
        return _watch.ended
    return None


def end(status: int) -> None:
    """Tells the others that this process is about to end, after it has done its work or has told why not.

    Args:
        status: The status that it ends with; 0 if all is done.
    """
    global _watch
    watch, _watch = _watch, None
    if watch is not None:
        watch.end(status)


class _Watch(threading.Thread):
    """A thread that looks after the other processes.

    Attributes:
        ended: The first of them that has ended before its work was done.
        found: Set when there is one.
    """

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(daemon=True, name="moka_pl watch")
        self.ended: Ended | None = None
        self.found = threading.Event()
        self._trainer = trainer
        self._run = _runs
        self._store: Any = None
        self._lifeline: Lifeline | None = None
        self._over, self._using = threading.Event(), threading.Lock()

    def run(self) -> None:
        """Looks, until this process is at its end or another one is."""
        while self.ended is None and not self._over.is_set():
            with self._using:
                self.ended = self._ended_child() or self._ended_peer()
        if self.ended is not None:
            self.found.set()
            if not self._over.wait(_GRACE):
                self._leave(self.ended)

    def end(self, status: int) -> None:
        """Tells the others that this process ends, and stops."""
        self._over.set()
        with self._using:
            if self._lifeline is None:
                return
            self._lifeline.say(Ended(self._trainer.global_rank, status))
            self._lifeline.close()
        if status:  # what Python and the GPU's libraries clean up may wait for the others
            with suppress(AttributeError, ValueError):
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(round(_GRACE))

    def _ended_child(self) -> Ended | None:
        """A process that this one has started. It may not have come as far as to connect."""
        children = ranks.started()
        if children:
            without_process_observer()  # this is one
        for place, process in enumerate(children, 1):
            if code := process.poll():
                return Ended(self._trainer.global_rank + place, code if code > 0 else LOST)
        return None

    def _ended_peer(self) -> Ended | None:
        """A process of any machine, within half a second."""
        with suppress(OSError, RuntimeError):
            if self._lifeline is None and (store := ranks.run_store()) is not None:
                self._store = store.clone()  # the main thread may wait in the other one
                host = self._trainer.strategy.cluster_environment.main_address  # type: ignore[attr-defined]
                self._lifeline = Lifeline(self._store, self._trainer.global_rank, host, self._run)
            if self._lifeline is not None and self._lifeline.connect():
                return self._lifeline.look(_EVERY)
        self._over.wait(_EVERY)
        return None

    def _leave(self, ended: Ended) -> None:
        """Ends the process, whose main thread waits in vain."""
        from moka_pl.training.accidents import first_rank  # loads torch, as every run has by now

        if not _within(_SAVING, first_rank.save_now):
            _within(_TELLING, first_rank.give_up_saving)
        _within(_TELLING, lambda: self._tell(ended))
        ranks.end_others(at_once=True)
        os._exit(1 if ended.status == LOST else ended.status)

    def _tell(self, ended: Ended) -> None:
        if ended.status == LOST and ranks.tells(1, lost=True, store=self._store):
            message = ranks.lost_rank_message(f"rank {ended.rank}")
            print(f"moka_pl: error: {printable(message)}", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


def _within(seconds: float, act: Callable[[], None]) -> bool:
    """Does something that may never come to an end, for some time; returns whether it did."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
