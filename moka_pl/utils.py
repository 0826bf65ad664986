"""Small helpers: what other libraries say and read, checking folders, and replacing what is there whole."""

import errno
import logging
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from moka_pl.errors import ConfigError, MokaWarning, terminate

#: Signals that ask for an end, beside Ctrl-C's: a scheduler's, and those of a terminal that is closed.
ENDING = "SIGTERM", "SIGHUP", "SIGUSR1"
#: How a file begins that stands for one of Git LFS.
LFS_POINTER = b"version https://git-lfs"
#: Variables that set the allocator of GPU memory; the later ones are older names of the first.
_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"


def set_environment() -> None:
    """Sets what other libraries read from the environment, unless the user has; before they are imported.

    Threads of tokenisation and of data loading workers would warn about each other. Pieces of GPU memory grow
    where they lie: free memory between pieces of fixed sizes is of no use to long rows. On Windows, also
    within its Linux, drivers do not let them grow.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.platform == "linux" and "microsoft" not in platform.release().lower():
        if not any(name in os.environ for name in _ALLOCATOR):
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


@contextmanager
def silenced(*names: str, below: int = logging.WARNING) -> Iterator[None]:
    """Runs the body with some loggers silenced below a level, and restores their levels."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(below)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Ends the body on :data:`ENDING` signals as on Ctrl-C, where they have no other meaning to it."""
    numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def warn(message: str) -> None:
    """Warns the user in one line, on the first process of several."""
    from lightning.pytorch.utilities import rank_zero_warn

    rank_zero_warn(message, category=MokaWarning, stacklevel=5)


def expanded(path: str | os.PathLike[str]) -> Path:
    """Puts the home folder in the place of a leading ``~``; one of an unknown user is a name like others."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # pathlib's raises an error there


def unfetched_reason(file: Path) -> str | None:
    """Tells of a file of which ``git clone`` without Git LFS has left a pointer in its place; else None."""
    try:
        with file.open("rb") as opened:
            begun = opened.read(len(LFS_POINTER))
    except OSError:  # reading it as a whole will tell
        return None
    if begun != LFS_POINTER:
        return None
    return f"{file.name} is only Git LFS's pointer to the file; run git lfs pull in {file.parent}"


def make_folder(folder: Path, option: str) -> None:
    """Makes a folder and its parents, and reports an unwritable one before any work.

    Raises:
        ConfigError: If the folder is not writable; it names the option.
    """
    if (reason := unwritable_reason(folder)) is not None:
        raise ConfigError(f"{option} {folder}: cannot write there ({reason}); choose another folder")


def unwritable_reason(folder: Path) -> str | None:
    """Makes a folder and returns why no file can be written there, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # a full disk may still have room for a name
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            return f"{existing_folder(folder)} is a file"
        return error.strerror or str(error)
    return None


def write_failure(error: OSError, folder: Path, size: int | None = None) -> str:
    """Returns why writing failed; where a disk or a quota is full, with the space needed and free.

    Args:
        error: What the system said.
        folder: Where it was written, or would have been.
        size: Bytes to write, if known.
    """
    reason = error.strerror or str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return reason
    needed = "" if size is None else f"{_mebibytes(size)} needed, "
    return f"{reason} ({needed}{_mebibytes(_free(folder))} free)"


def space_shortage(folder: Path, size: int) -> str | None:
    """Returns what a disk lacks for something that is about to be written; None if it has the room.

    Args:
        folder: Where it will be written; it need not exist yet.
        size: Bytes to write.
    """
    try:
        free = _free(folder)
    except OSError:  # writing will tell
        return None
    return None if size <= free else f"about {_mebibytes(size)} needed, {_mebibytes(free)} free"


def existing_folder(folder: Path) -> Path:
    """Returns the nearest folder above ``folder``, or itself, that exists."""
    folder = folder.absolute()
    return next((one for one in (folder, *folder.parents) if one.exists()), folder)


def _free(folder: Path) -> int:
    return shutil.disk_usage(existing_folder(folder)).free


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 / 10 else f"{size:,} bytes"


@contextmanager
def replaced_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that takes the place of ``path`` once it is whole, unless the body fails.

    Raises:
        OSError: If it cannot be written. ``path`` is then unchanged.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Replacing a folder. A scratch folder `.<name>-<8 characters>` beside it holds the new contents: as `new`
# while they are written, then as `whole`. Its process has locked it, until it ends or is killed.

_TOKEN = "[a-z0-9_]{8}"


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Gives the path of a folder to make, which then takes the place of ``path``, unless the body fails.

    A kill at any instruction leaves at ``path`` the older folder or the new one, whole: the system exchanges
    their names. Where it cannot (some network file systems), the older one is called ``<name>.older-<…>`` for
    an instant, and :func:`recover_folder` gives it its name back. What killed processes have left beside
    ``path`` is cleared away.

    Raises:
        OSError: If nothing can be written there. ``path`` is then unchanged.
    """
    path = Path(os.path.realpath(path))  # beside the folder itself, where `path` is a link
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    _clear_left_overs(path)
    scratch, lock = _make_scratch(path)
    try:
        new = scratch / "new"
        yield new
        whole = new.rename(scratch / "whole")
        _put(whole, path, path.with_name(f"{path.name}.older-{scratch.name[-8:]}"))
        sync_folder(path.parent)
    finally:
        # Never the only copy: the older folder lies in it only where the new one has its place.
        shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def recover_folder(path: Path) -> None:
    """Gives a missing folder back, if a process was killed while it replaced it."""
    path = Path(os.path.realpath(path))
    for _ in range(100):  # a living process is about to finish
        copies = [] if os.path.lexists(path) else _left_overs(path)
        for folder, owner in sorted(copies, key=lambda copy: _age(copy[0])):
            with _abandoned(owner) as free, suppress(OSError):  # a disk that cannot be written, perhaps
                if free and not os.path.lexists(path):
                    folder.rename(path)
                    warnings.warn(
                        f"{path} is restored: a killed process had left it under the name {folder.name}",
                        MokaWarning,
                        stacklevel=2,
                    )
                    return
        if not copies:
            return
        time.sleep(0.01)


def _age(folder: Path) -> float:
    try:
        return -folder.stat().st_mtime
    except OSError:
        return 0.0


def _left_overs(path: Path) -> list[tuple[Path, Path]]:
    """Returns the whole copies of ``path`` beside it, each with the scratch folder of its process."""
    older = _beside(path, rf"{re.escape(path.name)}\.older-{_TOKEN}")
    found = [(folder, path.with_name(f".{path.name}-{folder.name[-8:]}")) for folder in older]
    scratches = _beside(path, rf"\.{re.escape(path.name)}-{_TOKEN}")
    names = ("whole", "old")  # the second one by earlier versions of this package
    return found + [(scratch / n, scratch) for scratch in scratches for n in names if (scratch / n).is_dir()]


def _clear_left_overs(path: Path) -> None:
    """Removes what killed processes have left beside ``path``, unless it is the only copy."""
    for folder, owner in _left_overs(path):
        with _abandoned(owner) as free:
            if free and path.exists():
                shutil.rmtree(folder, ignore_errors=True)
    for scratch in _beside(path, rf"\.{re.escape(path.name)}-{_TOKEN}"):
        with suppress(OSError), _abandoned(scratch) as free:
            if free and {entry.name for entry in scratch.iterdir()} <= {"new"}:
                shutil.rmtree(scratch, ignore_errors=True)


def _beside(path: Path, pattern: str) -> list[Path]:
    """Returns the folders beside ``path`` with a name of this pattern."""
    if not path.parent.is_dir():
        return []
    named = [item for item in path.parent.iterdir() if re.fullmatch(pattern, item.name)]
    return [item for item in named if item.is_dir() and not item.is_symlink()]


def _make_scratch(path: Path) -> tuple[Path, int | None]:
    """Makes a scratch folder for ``path``, with a lock on it where the system has such locks."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        lock = _lock(scratch, wait=True)
        if scratch.exists():  # no other process has cleared it away between the two
            return scratch, lock
        if lock is not None:
            os.close(lock)


@contextmanager
def _abandoned(scratch: Path) -> Iterator[bool]:
    """Tells whether no living process holds a scratch folder; none can take it while the body runs."""
    lock = _lock(scratch, wait=False)
    try:
        yield lock is not None or not scratch.exists()
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, wait: bool) -> int | None:
    """Locks a folder for as long as the returned descriptor is open; None if that is impossible."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _put(whole: Path, path: Path, older: Path) -> None:
    """Puts ``whole`` in the place of ``path``, which may have to be called ``older`` for an instant."""
    if not os.path.lexists(path):
        whole.rename(path)
        return
    if _exchange(whole, path):
        return
    try:
        path.rename(older)
        whole.rename(path)
    finally:
        if not os.path.lexists(path) and older.exists():
            older.rename(path)
    shutil.rmtree(older, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False where the system or the file system cannot."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        failed = library.renameat2(here, names[0], here, names[1], exchange)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, 2)  # RENAME_SWAP
    else:
        return False
    number = ctypes.get_errno()
    if failed and number not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        raise OSError(number, os.strerror(number), str(other))
    return not failed


def sync_file(file: Path) -> None:
    """Waits until a file's contents are on disk: a full disk must show before an older file goes."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
