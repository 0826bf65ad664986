"""A training of many minutes, watched; ``scripts/long_run.py`` runs it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from moka_pl.studies.common import Parser, one_line_errors, positive_int, positive_number
from moka_pl.studies.long_run.watch import SAVED
from moka_pl.studies.outputs import REPLACED, json_lines_output
from moka_pl.studies.ranks.runs import LENGTH, run_to_end, write_texts

DESCRIPTION = """\
Watches a training of many minutes, through the command line that users run.

    python scripts/long_run.py --minutes 20 --lines drift.jsonl
    python scripts/long_run.py --minutes 4 --turns 40 --lines logging.jsonl

Trains a 4-bit model of a known shape with random weights on rows of 512 tokens, with MoKA of few
components in all linear layers, logs gates to TensorBoard and saves a checkpoint every 200 steps. Each
minute it prints the median time of a step, memory of GPU and process, open files and threads; once, from
recorded kernels, the share of the time in which the GPU computes; and at the end nvidia-smi's mean of it.
--turns switches logging off and on after this many steps, and prints what it adds to a step.
"""
_COLUMNS = {
    "minutes": ("min", ".1f"),
    "step": ("step", ".0f"),
    "ms": ("step ms", ".1f"),
    "slowest_ms": ("slowest", ".1f"),
    "allocated_mib": ("GPU MiB", ".0f"),
    "reserved_mib": ("reserved", ".0f"),
    "rss_mib": ("RSS MiB", ".0f"),
    "descriptors": ("files", ".0f"),
    "threads": ("threads", ".0f"),
    "events_mb": ("events MB", ".2f"),
    "saving_seconds": ("saving s", ".2f"),
}
#: The length that the run is said to have: how often gates are logged depends on it.
STEPS = 10_000
#: Tokens that a GPU trains on in a second, at most: so much text is written.
_FASTEST = 16_000


@one_line_errors("long_run")
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table, line by line.

    Args:
        arguments: Default: the process's.
    """
    parser = Parser("long_run", DESCRIPTION)
    parser.add_argument("--minutes", type=positive_number, default=20.0, help="time of the training")
    parser.add_argument("--shape", default="llama2-7b", help="shape of the model (see BackboneConfig.name)")
    parser.add_argument("--components", type=positive_int, default=2, help="components of each adapted layer")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="rows of 512 tokens")
    parser.add_argument(
        "--turns", type=positive_int, help="steps after which logging is switched, a multiple of 10"
    )
    parser.add_argument("--seconds", type=positive_number, default=60.0, help="time between two lines")
    parser.add_argument("--accelerator", default="gpu", help="cpu tries the command out")
    parser.add_argument(
        "--lines", type=json_lines_output(_is_line), help=f"a file for the lines, as JSON; {REPLACED}"
    )
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.jsonl" if args.lines is None else args.lines
        lines.parent.mkdir(parents=True, exist_ok=True)
        lines.write_text("", encoding="utf-8")
        command = fit_command(
            Path(folder), lines, args.minutes, args.shape, args.components, args.batch_size, args.accelerator
        )
        command += [f"--trainer.callbacks.seconds={args.seconds}"]
        if args.turns is not None:
            command += [f"--trainer.callbacks.turns={args.turns}"]
        else:
            command += ["--trainer.callbacks.profile_at=60"]
        print("  ".join(f"{head:>9}" for head, _ in _COLUMNS.values()), flush=True)
        with _Use() as use, _Following(lines):
            run_to_end(command, Path(folder) / "output.txt", 60 * args.minutes + 900)
        if use.shares:
            told = {"nvidia_smi_percent": fmean(use.shares), "samples": len(use.shares)}
            with lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(told) + "\n")
            print(json.dumps(told), flush=True)


def _is_line(content: Any) -> bool:
    """Whether a JSON value is a line of the file of lines: of :class:`Watch`, or the last one."""
    marks = "slowest_ms", "profiled_steps", "not_profiled", "pairs", "nvidia_smi_percent"
    return isinstance(content, dict) and any(mark in content for mark in marks)


def fit_command(
    folder: Path,
    lines: Path,
    minutes: float,
    shape: str,
    components: int,
    batch_size: int,
    accelerator: str,
) -> list[str]:
    """Returns the training as a command.

    Args:
        folder: For its data and its log.
        lines: Where what is watched is written.
        minutes: Its time.
        shape: Shape of the model.
        components: Components of each adapted layer.
        batch_size: Rows of a batch.
        accelerator: Lightning's name of the device's kind.
    """
    texts = folder / "texts.jsonl"
    write_texts(texts, rows=int(60 * minutes * _FASTEST / LENGTH))
    whole, seconds = divmod(round(60 * minutes), 60)
    options = {
        "model.backbone.name": shape,
        "model.backbone.weights": "random",
        "model.adapter.components": components,
        "model.adapter.target_modules": "all-linear",
        "data": "moka_pl.data.TextData",
        "data.init_args.path": texts,
        "data.init_args.batch_size": batch_size,
        "data.init_args.max_length": LENGTH,
        "trainer.accelerator": accelerator,
        "trainer.accumulate_grad_batches": 1,
        "trainer.max_epochs": -1,
        "trainer.max_steps": STEPS,
        "trainer.max_time": f"00:00:{whole:02d}:{seconds:02d}",
        "trainer.limit_val_batches": 0,
        "trainer.val_check_interval": 1.0,
        "trainer.logger.init_args.save_dir": folder,
        "checkpoint.every_n_train_steps": SAVED,
        "trainer.callbacks+": "moka_pl.studies.long_run.watch.RunWatch",
        "trainer.callbacks.file": lines,
    }
    command = [sys.executable, "-m", "moka_pl", "fit", "--config", "configs/llama2.yaml"]
    return command + [f"--{name}={value}" for name, value in options.items()]


def cells(line: dict[str, Any]) -> str:
    """Returns a line as a row of the table; what is no row as JSON."""
    if "minutes" not in line:
        return json.dumps(line)
    found = ((line[name], form) for name, (_, form) in _COLUMNS.items())
    return "  ".join(f"{'' if value is None else format(value, form):>9}" for value, form in found)


class _Use:
    """Asks nvidia-smi each second how much of the time the first GPU computes.

    Attributes:
        shares: Percent.
    """

    def __init__(self) -> None:
        self.shares: list[float] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "_Use":
        if (program := shutil.which("nvidia-smi")) is not None:
            card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
            query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-l", "1", "-i", card]
            self._process = subprocess.Popen([program, *query], stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                share = float(line)
            except ValueError:
                continue
            if share or self.shares:  # not before the training
                self.shares.append(share)

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class _Following:
    """Prints the lines of a file as they come.

    Args:
        file: The file.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._ended = file, threading.Event()
        self._thread = threading.Thread(target=self._follow)

    def __enter__(self) -> None:
        self._thread.start()

    def _follow(self) -> None:
        with self._file.open(encoding="utf-8") as file:
            ended = False
            while not ended:
                ended = self._ended.wait(1.0)
                for line in file.readlines():
                    print(cells(json.loads(line)), flush=True)

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
