"""Runs of several processes of which one fails on purpose.

As a script, this file is each of the processes: its arguments are the rank that fails, how it does, and the
command's. Lightning starts the others with the same ones. How: ``raises`` or ``killed`` in the third training
step, ``no-data`` to read, or ``terminated`` (SIGTERM) in the base's validation before training. With
``stuck`` the others stand still in that step, in a call that nothing interrupts, as where a GPU waits for
another one.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

#: The step in which a rank fails.
FAILS_IN = 3
#: Seconds in which all processes have to end.
LIMIT = 30.0
#: What the error says that is raised on purpose.
PURPOSE = "failed on purpose"
#: Holds when a rank has failed.
TIME = "failed.txt"


def write_run(folder: Path, steps: int, every: int, **trainer: Any) -> None:
    """Writes ``config.yaml`` and data of a run of two ranks over two epochs.

    Args:
        folder: Where to.
        steps: The number of steps.
        every: The steps from checkpoint to checkpoint.
        **trainer: Options of the trainer.
    """
    from shared.runs import instruction_run  # a script that imports this file does not find it

    rows = [{"instruction": f"{n}?", "output": "word " * (1 + n % 4)} for n in range(2 * steps)]
    for name, some in (("train", rows), ("heldout", rows[:3])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    config = instruction_run(folder, max_length=256)
    config["trainer"] |= {"devices": 2} | trainer
    config["checkpoint"] = {"every_n_train_steps": every}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def spoil(how: str, fails: bool, error: Callable[[str], Exception]) -> None:
    """Has this process fail in its third training step, or stand still there.

    Args:
        how: See above.
        fails: Whether this process is the one.
        error: Makes what is raised.
    """
    from moka_pl.training.module import MokaModule

    compute, steps = MokaModule.training_step, []

    def training_step(self: MokaModule, *args: Any) -> Any:
        steps.append(args)
        if len(steps) == FAILS_IN and fails:
            Path(TIME).write_text(str(time.time()))
            if "killed" in how:
                os.kill(os.getpid(), signal.SIGKILL)
            raise error(PURPOSE)
        if len(steps) == FAILS_IN and "stuck" in how:
            _stand_still()
        return compute(self, *args)

    validate = MokaModule.validation_step

    def validation_step(self: MokaModule, *args: Any) -> Any:
        if fails and not Path(TIME).exists():
            Path(TIME).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, *args)

    if "raises" in how or "killed" in how:
        MokaModule.training_step = training_step  # type: ignore[method-assign]
    if "terminated" in how:
        MokaModule.validation_step = validation_step  # type: ignore[method-assign]


def _stand_still() -> None:
    """Waits for ever, with Python's lock let go of, and whatever signal comes."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


class FailingRun:
    """A command in processes of which one fails, begun when this is made.

    Args:
        folder: Where it runs, with ``config.yaml``.
        rank: The rank that fails; -1 for none.
        how: See above.
        *arguments: More of the command's.
        port: That the first process listens on; any without.
    """

    def __init__(self, folder: Path, rank: int, how: str, *arguments: str, port: str | None = None) -> None:
        from shared.environment import own_environment

        clean = own_environment(folder / "cache")
        clean |= {} if port is None else {"MASTER_PORT": port}
        self._folder, self._file = folder, folder / f"{how}-{rank}.txt"
        with self._file.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(rank), how, "fit", "--config", "config.yaml", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=clean,
                cwd=folder,
                start_new_session=True,
            )

    def finish(self, timeout: float) -> tuple[int, float, list[str], str]:
        """Waits for the first process, then for all others.

        Returns:
            The first one's exit code, the seconds from the failure to the end of the last one, the commands
            of those that did not end, and all that was printed.
        """
        try:
            code = self._process.wait(timeout)
            until = time.monotonic() + LIMIT
            while (left := self._left()) and time.monotonic() < until:
                time.sleep(0.1)
            now = time.time()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        failed = self._folder / TIME
        seconds = now - float(failed.read_text()) if failed.is_file() else 0.0
        return code, seconds, left, self._file.read_text(errors="replace")

    def _left(self) -> list[str]:
        """The processes of this run that run on: all are of one session."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self._process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
        return found


if __name__ == "__main__":
    from moka_pl.cli.main import main
    from moka_pl.errors import DataError

    rank, how, *arguments = sys.argv[1:]
    fails = rank == os.environ.get("LOCAL_RANK", "0")
    spoil(how, fails, DataError)
    lacks = fails and how == "no-data"
    try:
        main([*arguments, "--data.init_args.path", "missing.jsonl"] if lacks else arguments)
    finally:
        if lacks:
            Path(TIME).write_text(str(time.time()))
