"""A file of answers, which has its name only once it is whole."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from moka_pl.errors import ConfigError
from moka_pl.utils import sync_file, sync_folder, unwritable_reason, write_failure

#: The answers known so far stand beside the file, behind a line that says what they belong to.
_RUN, _NUMBER = "run", "number"


class Predictions:
    """Answers to numbered prompts, of which those of an interrupted run are known already.

    Args:
        output: The file to write, one JSON object a line in the order of the prompts.
        run: What decides the answers; those of another run are not taken.

    Attributes:
        done: Known answers by number.
    """

    def __init__(self, output: Path, run: str) -> None:
        self.output = output
        self.part = _part_of(output)
        self._run = run
        self.done: dict[int, dict[str, Any]] = {}

    @contextmanager
    def opened(self) -> Iterator["Predictions"]:
        """Reads what an interrupted run has left, and takes further answers within the block.

        Raises:
            ConfigError: If another process writes there, or the disk is full or read-only.
        """
        try:
            with self.part.open("a+b") as self._file:
                _lock(self._file, self.output)
                self._read()
                yield self
        except OSError as error:
            reason = write_failure(error, self.output.parent)
            raise ConfigError(
                f"cannot write to {self.output}: {reason}. The answers so far are kept: free some space, and "
                "run the same command again"
            ) from error

    def add(self, number: int, answer: Mapping[str, Any]) -> None:
        """Keeps the answer to a prompt."""
        self.done[number] = dict(answer)
        self._file.write(_line({_NUMBER: number, **answer}))
        self._file.flush()

    def finish(self) -> None:
        """Writes the file and gives it its name; within the block of ``opened``."""
        whole = self.output.with_name(f".{self.output.name}.whole")
        try:
            with whole.open("wb") as file:
                file.writelines(_line(self.done[number]) for number in sorted(self.done))
            sync_file(whole)
            whole.replace(self.output)
        finally:
            whole.unlink(missing_ok=True)
        sync_folder(self.output.parent)
        self.part.unlink()

    def _read(self) -> None:
        """Reads the lines that are whole; a killed process may have left half a one."""
        self._file.seek(0)
        end, run = 0, None
        for line in iter(self._file.readline, b""):
            with suppress(ValueError, TypeError, KeyError):
                stored = json.loads(line if line.endswith(b"\n") else b"")
                if run is None:
                    run = stored[_RUN]
                else:
                    self.done[int(stored.pop(_NUMBER))] = stored
                end = self._file.tell()
                continue
            break
        if run != self._run:
            end = 0
            self.done.clear()
        self._file.seek(end)
        self._file.truncate()
        if not end:
            self._file.write(_line({_RUN: self._run}))
            self._file.flush()


def check_output(output: Path, overwrite: bool, read: Iterable[Path] = ()) -> None:
    """Refuses a file that is there, unless it may be replaced, and one that cannot be written.

    One that another process is writing is refused, too.

    Args:
        output: The file to write.
        overwrite: Whether it may be replaced.
        read: Files that are read, which are never replaced.

    Raises:
        ConfigError: Naming it.
    """
    if output.name == "-":
        raise ConfigError(
            "--output - would be a file of that name; name a file, or print answers by generate"
        )
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; name a file in it, such as {output}/answers.jsonl")
    if os.path.lexists(output) and not overwrite:
        raise ConfigError(f"--output {output} is there already; choose another file, or set --overwrite")
    if output.exists() and any(file.exists() and file.samefile(output) for file in read):
        raise ConfigError(f"--output {output} is read for the answers; choose another file")
    reason = unwritable_reason(output.parent)
    if reason is not None:
        raise ConfigError(f"--output {output}: cannot write there ({reason}); choose another file")
    with suppress(FileNotFoundError), _part_of(output).open("rb") as file:
        _lock(file, output)


def _part_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.part")


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _lock(file: IO[bytes], output: Path) -> None:
    """Keeps other processes away until the file is closed, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"another process is writing {output}; wait for it, or end it") from error
    except OSError:  # some network file systems have none
        return
