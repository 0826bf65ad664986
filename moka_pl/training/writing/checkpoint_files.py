"""Checkpoint files: written whole or not at all, and read with what is wrong with them in one line."""

import errno
import fcntl
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from moka_pl.errors import CheckpointError, ConfigError, listed, one_line
from moka_pl.ops.finite import named_tensors, non_finite_names
from moka_pl.utils import sync_folder, write_failure

#: Ends the names of files that are being written.
_PART = ".part"

#: What is written for the pickled part of a checkpoint and the archive's own structure, at least.
_OVERHEAD = 1 << 16


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address that Lightning's file systems read, rather than a local file."""
    return "://" in str(path)


# Writing


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns the trainable tensors by name: checkpoints hold no others, and to collect those takes long."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def write_whole(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint under another name in the same folder, and renames it once it is on the disk.

    Raises:
        CheckpointError: It cannot be written; an older file is as it was.
    """
    needed = size_of(checkpoint)
    make_room(path, needed)
    try:
        with _replacing(path) as file:
            sink = _Sink(file)
            torch.save(checkpoint, cast(IO[bytes], sink))
            if sink.error is not None:
                raise sink.error
    except OSError as error:
        raise CheckpointError(_unwritten(path, needed, error)) from error


def make_room(path: Path, needed: int) -> None:
    """Makes the folder of a file that is to be written, and sees that there is room for it.

    Raises:
        CheckpointError: There is not.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise CheckpointError(_unwritten(path, needed, error)) from error


def write_again(written: Path | None, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Gives a file another name, or writes its checkpoint there where that is not possible.

    Args:
        written: The file; None if there is none yet.
        checkpoint: What it holds.
        path: The name.

    Raises:
        CheckpointError: It cannot be written; an older file is as it was.
    """
    if written is None or not link_whole(written, path):
        write_whole(checkpoint, path)


def link_whole(written: Path, path: Path) -> bool:
    """Gives a file that is written whole another name, in the place of an older file.

    Returns:
        Whether it has it; some file systems know no hard links.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(written, temporary)
        temporary.replace(path)
    except OSError:
        return False
    finally:
        temporary.unlink(missing_ok=True)  # to rename a file to a name that it has does nothing
    sync_folder(path.parent)
    return True


def remove_leftovers(folder: Path) -> None:
    """Removes what writers that were killed have left in a folder of checkpoints."""
    for leftover in folder.glob(f".*{_PART}"):
        with suppress(OSError), leftover.open("r+b") as file:
            if _lock(file):  # no writer holds it: it is not being written
                leftover.unlink()


def size_of(checkpoint: Any) -> int:
    """Returns about how many bytes a checkpoint takes on the disk."""
    storages = (tensor.untyped_storage() for _, tensor in named_tensors(checkpoint))
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(sizes.values()) + _OVERHEAD


class _Sink:
    """A file for ``torch.save``, whose C++ writer does not survive an exception: it is kept for later."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a new file that takes the place of ``path`` if the body ends well, and is removed if not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART}")
    try:
        with temporary.open("xb") as file:
            _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _lock(file: IO[bytes]) -> bool:
    """Takes the lock of a file being written, which ends with its process; whether it was free."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _unwritten(path: Path, needed: int, error: OSError) -> str:
    text = f"cannot write the checkpoint {path}: {write_failure(error, path.parent, needed)}"
    kept = "The older file is unchanged. " if path.exists() else ""
    return (
        f"{text}. {kept}Free some space or set another checkpoint.dirpath, then resume with --ckpt_path last"
    )


# Reading


def read_checkpoint(path: Path, mmap: bool = True) -> dict[str, Any]:
    """Reads a checkpoint, without unpickling anything but tensors and plain values.

    With ``mmap`` its tensors stay in the file until they are used.

    Raises:
        ConfigError: The file is damaged, no checkpoint, or holds values that are not finite.
    """
    if (reason := unusable_reason(path)) is not None:
        raise ConfigError(
            f"--ckpt_path {path} {reason}. Give another one; --ckpt_path last finds the last good one"
        )
    return _load(path, mmap)


def peek(path: Path) -> dict[str, Any]:
    """Returns a checkpoint that need not be complete, its tensors left in the file.

    Raises:
        ConfigError: The file is damaged or no checkpoint.
    """
    try:
        return _load(path)
    except Exception as error:  # see unusable_reason
        raise ConfigError(
            f"--ckpt_path {path} is damaged or not a checkpoint ({one_line(error)}). Give another one"
        ) from error


def step_of(path: Path) -> int:
    """Returns the optimizer step of a checkpoint; -1 where it cannot be read."""
    try:
        return int(peek(path).get("global_step", -1))
    except (ConfigError, AttributeError, TypeError, ValueError):
        return -1


def unusable_reason(path: Path) -> str | None:
    """Returns why training cannot go on from a file, as the end of a sentence; None if it can."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                return f"is damaged or not a checkpoint (wrong checksum of its part {broken})"
        stored = _load(path)
        if not isinstance(stored.get("state_dict"), Mapping):
            raise ValueError("it has no state_dict")
    # The unpickler of a damaged file raises whatever its bytes happen to mean.
    except Exception as error:
        return f"is damaged or not a checkpoint ({one_line(error)})"
    names = non_finite_names({name: stored.get(name) for name in ("state_dict", "optimizer_states")})
    if names:
        return f"holds values that are not finite (in {listed(names, 1)}): its training had failed"
    return None


def _load(path: Path, mmap: bool = True) -> dict[str, Any]:
    mmap = mmap and zipfile.is_zipfile(path)
    stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    return stored
