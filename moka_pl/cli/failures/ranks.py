"""What ended a run of several processes, told by one of them.

A process that fails tells why and is gone. All others then fail, too, in whatever they were waiting for each
other: their tracebacks say nothing, and hide the one line that does. So the first to fail leaves a word in
the store that has brought the processes together, and the others end in silence.
"""

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from moka_pl._compat import rendezvous_store
from moka_pl.errors import MokaError, one_line

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_TOLD, _STATUS = "moka_pl/told", "moka_pl/status"
#: Words of gloo's and NCCL's errors where the other end of a connection is gone.
_GONE = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "ncclRemoteError")
#: Seconds that the processes that the first one started have to end by themselves.
_PATIENCE = 10.0

#: Tells the processes that Lightning starts for the first one of a machine which one that is.
_VARIABLE = "MOKA_PL_LAUNCHER"
#: Of Linux's ``prctl``: the signal that a process gets when its parent ends.
_PARENT_DEATH = 1

#: Has started the other processes of this machine, if Lightning has.
_launcher: Any = None


def join(trainer: "Trainer") -> None:
    """Has the processes that a trainer is about to start end with this one, however it ends.

    One that still waits for the first process to be there would wait for half an hour.
    """
    global _launcher
    _launcher = getattr(trainer.strategy, "launcher", None)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started all, and ends them together
        return
    parent = os.environ.get(_VARIABLE)
    if parent is None or trainer.local_rank == 0:
        os.environ[_VARIABLE] = str(os.getpid())
    elif sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
        if str(os.getppid()) != parent:  # it has ended before
            os.kill(os.getpid(), signal.SIGKILL)


def lost_rank_message(lost: BaseException | str) -> str:
    """Returns one line on a process that has ended without a word.

    Args:
        lost: Which one, or an error that says that it cannot be reached any more.
    """
    reason = lost if isinstance(lost, str) else one_line(_cause(lost)).partition(". This is typically")[0]
    return (
        f"another process of this run has ended without a word, perhaps out of memory ({reason}). What was "
        "saved is whole: --ckpt_path last goes on from it"
    )


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error only says that another process cannot be reached."""
    error = _cause(error)
    if not isinstance(error, RuntimeError) or "torch" not in sys.modules:
        return False
    from torch import distributed

    if distributed.is_available() and isinstance(error, distributed.DistNetworkError):  # of the store
        return True
    return run_store() is not None and any(words in str(error) for words in _GONE)


def tells(status: int, lost: bool = False, store: Any = None) -> bool:
    """Whether this process is the one to tell what has ended the run; one of several is.

    Args:
        status: The status that it ends with.
        lost: Whether it only knows that another one is gone.
        store: The processes' store, if not by the connection that the main thread uses.
    """
    store = store or run_store()
    if store is None:
        return True
    try:
        first: bool = store.add(_TOLD, 1) == 1
        if first:
            store.set(_STATUS, str(status))
    except RuntimeError:  # the store was the first process's, which is gone
        from torch import distributed

        first = not lost or distributed.get_rank() == 1
    return first


def status_of_others(default: int) -> int:
    """The status that the first process to fail has ended with, as far as it is known."""
    store = run_store()
    with suppress(RuntimeError):
        if store is not None and store.check([_STATUS]):
            return int(store.get(_STATUS))
    return default


def started() -> "list[subprocess.Popen[bytes]]":
    """The processes that this one has started, or that Lightning has for it."""
    return [process for process in getattr(_launcher, "procs", []) if hasattr(process, "poll")]


def end_together() -> None:
    """Ends the processes that this one has started, once all have done their work.

    NCCL takes its connections down on all of them at a time: their end would be waited for in vain before
    this process has let go of its own.
    """
    if started():
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
    end_others(at_once=False)


def end_others(at_once: bool) -> None:
    """Ends the processes that this one has started: without it they have nothing to do.

    Args:
        at_once: Whether they are not to end by themselves first, such as after they have told why.
    """
    os.environ.pop(_VARIABLE, None)
    for process in started():
        if not at_once:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)
        process.kill()


def _cause(error: BaseException) -> BaseException:
    """The error of another library that one of the package's stands for."""
    return (error.__cause__ if isinstance(error, MokaError) else None) or error


def run_store() -> Any:
    """The store of the processes that run together; None of a single one."""
    if "torch" not in sys.modules:
        return None
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() < 2:
        return None
    return rendezvous_store()
