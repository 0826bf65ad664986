"""Which work and which waits a training's steps consist of, in files that people read."""

import traceback
import warnings
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

#: Lines of a table.
_LINES = 60
#: Calls named of each place that waits, and parts of paths that are no news.
_CALLS, _PLUMBING = 4, ("/torch/", "/warnings.py", "/lightning_utilities/", "/contextlib.py", __file__)


class StepProfile:
    """Looks for a number of steps who waits for the GPU, and for as many more at what host and GPU do.

    It writes ``waits.txt`` (lines of code that had the host wait for the GPU, with their numbers of waits),
    ``host.txt`` and ``gpu.txt`` (operations by their own time) and ``trace.json.gz`` (all of them on a time
    line, for https://ui.perfetto.dev). Both slow the steps down.

    Args:
        folder: Where to write them.
        begin: The step after which it begins to look.
        steps: Number of steps of each of the two.
    """

    def __init__(self, folder: Path, begin: int, steps: int) -> None:
        self.folder, self.begin, self.steps = folder, begin, steps
        self._waits = Waits()
        self._profiler: Any = None

    def end_step(self, step: int) -> None:
        """Begins or ends to look, if it is time.

        Args:
            step: Number of the step that has ended.
        """
        if step == self.begin:
            self._waits.begin()
        elif step == self.begin + self.steps:
            self._waits.end()
            file = self.folder / "waits.txt"
            file.write_text(self._waits.table(self.steps), encoding="utf-8")
            self._profiler = torch.profiler.profile(activities=_activities())
            self._profiler.start()
        elif step == self.begin + 2 * self.steps and self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()
            found = profiler.key_averages()
            for name, key in (("host", "self_cpu_time_total"), ("gpu", "self_device_time_total")):
                table = found.table(sort_by=key, row_limit=_LINES, max_name_column_width=80)
                (self.folder / f"{name}.txt").write_text(table, encoding="utf-8")
            profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))


def _activities() -> list[ProfilerActivity]:
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *gpu]


class Waits:
    """Counts by line of code the operations that have the host wait for the GPU, as PyTorch tells them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._stack = ExitStack()

    def begin(self) -> None:
        """Begins to count, in this thread's and all others' operations."""
        self._stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        others = warnings.showwarning

        def note(message: Any, *where: Any, **more: Any) -> None:
            if "synchronizing CUDA operation" in str(message):
                self.counts[_caller()] += 1
            else:
                others(message, *where, **more)

        warnings.showwarning = note  # catch_warnings puts the old one back
        if torch.cuda.is_available():
            self._stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("warn")

    def end(self) -> None:
        """Ends to count."""
        self._stack.close()

    def table(self, steps: int) -> str:
        """Returns a line for each place, the most frequent first.

        Args:
            steps: The number of steps, which the first line tells.
        """
        head = f"waits for the GPU in {steps} steps, by the calls that led there (the last one first)"
        return (
            "\n".join([head, *(f"{count:6d}  {where}" for where, count in self.counts.most_common())]) + "\n"
        )


def _caller() -> str:
    """Names the innermost calls that are not a library's plumbing."""
    frames = reversed(traceback.extract_stack())
    named = [f for f in frames if not any(part in f.filename for part in _PLUMBING)]
    return " < ".join(f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} {f.name}" for f in named[:_CALLS])
