"""Commands that train on rows of one length, and end with all that they started."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from moka_pl.errors import ConfigError

#: Tokens of a row.
LENGTH = 512
#: Characters of a failed command's output that are shown.
_TAIL = 3000


def write_texts(file: Path, rows: int) -> None:
    """Writes texts of as many bytes as fill the rows, of which a few are held out."""
    text = "Bread rises because yeast turns sugar into gas, which the dough holds. " * 400
    step = (LENGTH - 1) * 50  # the windows of 50 rows
    lines = [json.dumps({"text": f"{n}. {text}"[: step - 1]}) for n in range(rows // 40 + 4)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_to_end(command: Sequence[str], output: Path, timeout: float) -> None:
    """Waits for a command and all processes that it starts.

    Args:
        command: The command.
        output: A file for what it prints.
        timeout: Seconds after which it is killed.

    Raises:
        ConfigError: It failed, or took longer.
    """
    with output.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = -signal.SIGKILL
            reason = f"not done after {timeout:g} s"
        else:
            reason = f"status {status}"
    if status == 0:
        return
    printed = output.read_text(encoding="utf-8", errors="replace").strip()
    print(printed[-_TAIL:], file=sys.stderr, flush=True)
    last = printed.splitlines()[-1] if printed else ""
    raise ConfigError(f"{reason}: {last[-300:]}" if last else reason)
