"""How a trainer writes its checkpoints: whole or not at all, and while training goes on."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy

from moka_pl._compat import dumped_once
from moka_pl.errors import CheckpointError
from moka_pl.training.writing.checkpoint_files import (
    is_remote,
    make_room,
    read_checkpoint,
    size_of,
    stored_tensors,
    write_again,
)
from moka_pl.training.writing.host_copy import host_copy
from moka_pl.training.writing.jobs import Jobs


class WholeFiles(TorchCheckpointIO):
    """Writes a local checkpoint beside its target and then renames it; remote ones are Lightning's to write.

    After a crash at any moment the target is the old file or the new one. Lightning (2.6) writes to the
    system's temporary folder and moves the file, which is a copy where that is another file system.

    Within :meth:`same_moment` a thread may write, from a copy, while training goes on. Everywhere else a file
    is there when the call returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self._moment: _Moment | None = None
        self._jobs = Jobs()

    @contextmanager
    def same_moment(self, background: bool = False) -> Iterator[None]:
        """Writes the checkpoints of the body once, under all their names: nothing is trained in between.

        Args:
            background: Whether they may be written after the body. What goes wrong is then raised by
                :meth:`check`, or by whatever is the next to write, read or wait.
        """
        self._moment = _Moment(threading.get_ident(), background)
        try:
            yield
        finally:
            self._moment = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint.

        Args:
            checkpoint: What to write.
            path: Where to.
            storage_options: For remote addresses.

        Raises:
            CheckpointError: It cannot be written; an older file is as it was.
        """
        if is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        moment, path = self._here, Path(path)
        if not moment.background or (moment.written is None and not self._copies(checkpoint, path, moment)):
            self._write_now(checkpoint, path, moment)
        else:
            self._jobs.add(write_again, moment.written, moment.copy, path)
        moment.written = path

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint into the CPU's memory.

        Args:
            path: The file.
            map_location: For remote addresses.
            weights_only: For remote addresses; from a local file nothing is ever unpickled but plain values.

        Raises:
            ConfigError: The file is damaged, no checkpoint, or holds values that are not finite.
        """
        self.finish()
        if is_remote(path):
            return super().load_checkpoint(path, map_location=map_location, weights_only=weights_only)
        # Not mapped into memory: the optimizer goes on with the very tensors.
        return read_checkpoint(Path(path), mmap=False)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint, after all that was to be written before is there.

        Args:
            path: The file.
        """
        if self._here.background and not is_remote(path):
            self._jobs.add(super().remove_checkpoint, path)
        else:
            self.finish()
            super().remove_checkpoint(path)

    def check(self) -> None:
        """Raises what has gone wrong in the thread by now."""
        self._jobs.check()

    def finish(self) -> None:
        """Waits until all is written, and raises what has gone wrong."""
        self._jobs.finish()

    def teardown(self) -> None:
        """Waits until all is written, and ends the thread."""
        self._jobs.end()

    @property
    def _here(self) -> "_Moment":
        """The moment that the calling thread is in: another one may be stuck in its own."""
        thread, moment = threading.get_ident(), self._moment
        return moment if moment is not None and moment.thread == thread else _Moment(thread, False)

    def _copies(self, checkpoint: dict[str, Any], path: Path, moment: "_Moment") -> bool:
        """Copies a moment's checkpoint for the thread; whether it can be copied."""
        self.finish()  # one more copy in memory, at most
        make_room(path, size_of(checkpoint))
        try:
            moment.copy = host_copy(checkpoint)
        except (TypeError, RuntimeError):
            moment.background = False
        return moment.background

    def _write_now(self, checkpoint: dict[str, Any], path: Path, moment: "_Moment") -> None:
        """Writes a file before it returns, also where an earlier one could not be written."""
        failed: Exception | None = None
        try:
            self.finish()
        except (CheckpointError, OSError) as error:
            failed = error
        write_again(moment.written, checkpoint, path)
        if failed is not None:
            raise failed


@dataclass
class _Moment:
    """A moment of a run.

    Attributes:
        thread: Who is in it.
        background: Whether its checkpoint may be written later.
        copy: Its checkpoint, for that.
        written: The first of its files, written or about to be.
    """

    thread: int
    background: bool
    copy: dict[str, Any] = field(default_factory=dict)
    written: Path | None = None


def write_whole_files(trainer: Trainer) -> None:
    """Has a trainer write its checkpoints by :class:`WholeFiles`, unless it was given another way.

    Of a module with ``strict_loading = False`` it does not collect the frozen tensors, which are not stored.
    """
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeFiles()
    if getattr(type(strategy), "lightning_module_state_dict", None) is Strategy.lightning_module_state_dict:
        strategy.lightning_module_state_dict = partial(_stored, strategy)  # type: ignore[method-assign]


def _stored(strategy: Strategy) -> dict[str, Any]:
    module = strategy.lightning_module
    assert module is not None
    return module.state_dict() if module.strict_loading else stored_tensors(module)


@contextmanager
def same_moment(trainer: Trainer, background: bool = False) -> Iterator[None]:
    """Has a trainer write the checkpoints of one moment once.

    Args:
        trainer: The trainer.
        background: Whether they may be written after the body (:meth:`WholeFiles.same_moment`).
    """
    files = trainer.strategy.checkpoint_io
    if not isinstance(files, WholeFiles):
        yield
    elif not background:
        with files.same_moment():
            yield
    else:
        with dumped_once(trainer), files.same_moment(background=True):
            yield


def check_writing(trainer: Trainer) -> None:
    """Raises what has gone wrong with a checkpoint that is written while training goes on."""
    if isinstance(files := trainer.strategy.checkpoint_io, WholeFiles):
        files.check()


def finish_writing(trainer: Trainer) -> None:
    """Waits until a trainer's checkpoints are written, and raises what has gone wrong."""
    if isinstance(files := trainer.strategy.checkpoint_io, WholeFiles):
        files.finish()
