"""Watches a training from inside: step time, memory, files, threads, how busy the GPU is, what logs cost."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moka_pl.callbacks import GateMonitor
from moka_pl.errors import one_line
from moka_pl.studies.benchmark.steps import synchronise
from moka_pl.studies.common import Moment

#: Moments between which the GPU's time is taken.
Span = tuple[Moment, Moment]
#: Optimizer steps between two looks at the clock, which do not wait for the GPU.
BLOCK = 10
#: Optimizer steps between two checkpoints.
SAVED = 200
#: Optimizer steps that are profiled, and the share of them at the beginning that does not count.
_PROFILED, _LEFT_OUT = 24, 1 / 6


class RunWatch(Callback):
    """Appends lines of JSON to a file: one each minute, one on the GPU's use, one on what logging costs.

    Args:
        file: The file.
        seconds: Time between two lines.
        profile_at: The step from which on kernels are recorded; None for never.
        turns: After so many steps, logging and gates are switched off, and on after as many; None for never.
    """

    def __init__(
        self, file: str, seconds: float = 60.0, profile_at: int | None = None, turns: int | None = None
    ) -> None:
        self.file, self.seconds, self.profile_at, self.turns = Path(file), seconds, profile_at, turns
        self._begun = time.perf_counter()
        self._step = -1
        self._looked: Moment | None = None
        self._times: list[Span] = []
        self._end: Moment | None = None
        self._saving: list[Span] = []
        self._others: list[Span] = []
        self._profiler: Any = None
        self._switch: _Switch | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._looked = Moment(pl_module.device)
        self._step = trainer.global_step
        if self.turns is not None:
            self._switch = _Switch(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *of_batch: Any) -> None:
        """Notes how long callbacks took after a block, which may have saved a checkpoint."""
        if self._end is not None:
            saved = trainer.global_step % SAVED == 0
            (self._saving if saved else self._others).append((self._end, Moment(pl_module.device)))
            self._end = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *of_batch: Any) -> None:
        """Looks at the clock after each block of steps."""
        step = trainer.global_step
        if step == self._step:  # in the middle of an accumulated batch
            return
        self._step = step
        try:
            self._profile(step, pl_module.device)
        except (RuntimeError, AttributeError, AssertionError) as error:  # the run is worth more
            self._profiler = self.profile_at = None
            self._write({"not_profiled": one_line(error)})
        if step % BLOCK:
            return
        moment, now = Moment(pl_module.device), time.perf_counter()
        if self._profiler is None and self._looked is not None:
            self._times.append((self._looked, moment))
            if self._switch is not None and self.turns is not None and step % self.turns == 0:
                self._switch.turn(trainer, self._times)
                self._times = []
        if self._switch is None and now - self._begun >= self.seconds * (1 + self._lines):
            self._write(self._line(trainer, pl_module.device, now))
        self._end = self._looked = moment

    _lines = 0

    def _line(self, trainer: Trainer, device: torch.device, now: float) -> dict[str, Any]:
        """Describes the time since the last line."""
        self._lines += 1
        times, self._times = _milliseconds(self._times, BLOCK), []
        saving, self._saving = _milliseconds(self._saving), []
        process = psutil.Process()
        gpu = device.type == "cuda"
        usual = median(_milliseconds(self._others)) if self._others else 0.0
        return {
            "minutes": round((now - self._begun) / 60, 2),
            "step": trainer.global_step,
            "ms": median(times) if times else None,
            "slowest_ms": max(times, default=None),
            "allocated_mib": torch.cuda.memory_allocated(device) / 2**20 if gpu else None,
            "reserved_mib": torch.cuda.memory_reserved(device) / 2**20 if gpu else None,
            "rss_mib": process.memory_info().rss / 2**20,
            "descriptors": process.num_fds(),
            "threads": process.num_threads(),
            "events_mb": events_bytes(trainer) / 1e6,
            "saving_seconds": (median(saving) - usual) / 1e3 if saving else None,
        }

    def _profile(self, step: int, device: torch.device) -> None:
        """Records the kernels of some steps, and writes how much of the time the GPU was computing."""
        if self.profile_at is None or device.type != "cuda":
            return
        from torch.profiler import ProfilerActivity, profile

        if step == self.profile_at:
            synchronise(device)
            self._profiler = profile(activities=[ProfilerActivity.CUDA])
            self._profiler.start()
        elif step == self.profile_at + _PROFILED:
            synchronise(device)
            profiler, self._profiler = self._profiler, None
            profiler.stop()
            spans = [
                (event.time_range.start, event.time_range.end)
                for event in profiler.events()
                if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
            ]
            self._looked = Moment(device)
            self._write({"profiled_steps": _PROFILED, "kernels": len(spans), "busy": busy_share(spans)})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what logging costs, or the last line."""
        if self._switch is not None:
            self._switch.restore(trainer)  # the folder of the events is the logger's
            self._write(self._switch.result() | {"events_mb": events_bytes(trainer) / 1e6})
        elif self._times:
            self._write(self._line(trainer, pl_module.device, time.perf_counter()))

    def _write(self, line: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _milliseconds(spans: Sequence[Span], steps: int = 1) -> list[float]:
    """Returns the milliseconds of each span, by its steps; the GPU has to have come to the last one's end."""
    return [end.ms_since(begin) / steps for begin, end in spans]


class _Switch:
    """Switches loggers and gates off and on."""

    def __init__(self, trainer: Trainer) -> None:
        self._loggers, self._callbacks = list(trainer.loggers), list(trainer.callbacks)  # type: ignore[attr-defined]
        self._on = True
        self._windows: dict[bool, list[list[Span]]] = {True: [], False: []}

    def turn(self, trainer: Trainer, blocks: list[Span]) -> None:
        """Keeps the blocks of steps since the last turn, and switches."""
        self._windows[self._on].append(blocks)
        self._on = not self._on
        if self._on:
            self.restore(trainer)
            return
        trainer.loggers = []
        trainer.callbacks = [c for c in self._callbacks if not isinstance(c, GateMonitor)]  # type: ignore[attr-defined]

    def restore(self, trainer: Trainer) -> None:
        """Switches all on."""
        trainer.loggers = self._loggers
        trainer.callbacks = self._callbacks  # type: ignore[attr-defined]

    def result(self) -> dict[str, Any]:
        """Returns the step times of both, and the share that logging adds, from pair to pair."""
        means = {on: [fmean(_milliseconds(b, BLOCK)) for b in found] for on, found in self._windows.items()}
        pairs = list(zip(means[True], means[False], strict=False))[1:]  # the first warms up
        if not pairs:
            return {"pairs": 0}
        return {
            "pairs": len(pairs),
            "logged_ms": median(on for on, _ in pairs),
            "unlogged_ms": median(off for _, off in pairs),
            "share": median(on / off - 1 for on, off in pairs),
            "shares": [round(on / off - 1, 5) for on, off in pairs],
        }


def events_bytes(trainer: Trainer) -> int:
    """Returns the size of the event files of a run."""
    folder = trainer.log_dir
    files = Path(folder).glob("events.out.tfevents.*") if folder else ()
    return sum(file.stat().st_size for file in files)


def busy_share(spans: Sequence[tuple[float, float]]) -> float | None:
    """Returns the share of the time in which at least one kernel runs, without the first sixth of it.

    Args:
        spans: Beginnings and ends.
    """
    if not spans:
        return None
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    done = first = first + _LEFT_OUT * (last - first)
    busy = 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, done))
        done = max(done, end)
    return busy / (last - first) if last > first else None
