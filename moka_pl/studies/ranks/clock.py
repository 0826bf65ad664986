"""A clock within the measured trainings."""

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moka_pl.callbacks.throughput import peak_memory
from moka_pl.studies.benchmark.steps import synchronise
from moka_pl.studies.common import write_json
from moka_pl.studies.ranks.cases import BLOCK


class StepClock(Callback):
    """Takes the times of a training, and writes them beside those of the other ranks when it ends.

    The file of each rank holds the seconds since the epoch of 1970 of the command's stages (``imported``,
    ``built``, ``first_step``), tokens and seconds of each block of steps after the first ones, the seconds
    that the checkpoint took from the training, and losses, rows and the step at which it began.

    Args:
        folder: Where to write ``clock-RANK.json``.
        warmup: Optimizer steps at the beginning that do not count.
        saves_at: The step whose checkpoint is timed.
    """

    def __init__(self, folder: str, warmup: int, saves_at: int) -> None:
        self.folder, self.warmup, self.saves_at = Path(folder), warmup, saves_at
        self._stages = {"imported": time.time()}
        self._begun_at = 0
        self._position: list[int] = []
        self._tokens = 0
        self._end = 0.0
        self._looked: float | None = None
        self._blocks: list[tuple[int, float]] = []
        self._gaps: dict[int, float] = {}
        self._losses: list[Tensor] = []
        self._sums: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes where the training begins."""
        self._stages["built"] = time.time()
        self._begun_at = trainer.global_step
        self._position = [trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes how long the last step's callbacks took, whose work includes checkpoints."""
        if self._looked is not None:
            self._gaps[trainer.global_step - self._begun_at] = time.perf_counter() - self._looked
            self._looked = None
        self._sums.append(batch["input_ids"].sum())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the clock after each block of steps; callbacks that write files come later."""
        step = trainer.global_step - self._begun_at
        self._tokens += batch["num_tokens"]
        self._losses.append(trainer.callback_metrics["train/loss"])
        if step == 1:
            synchronise(pl_module.device)
            self._stages["first_step"] = time.time()
        if step < self.warmup or (step - self.warmup) % BLOCK:
            return
        synchronise(pl_module.device)
        now = time.perf_counter()
        if step > self.warmup and step <= self.saves_at:
            self._blocks.append((self._tokens, now - self._end))
        self._tokens, self._end, self._looked = 0, now, now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what was measured."""
        device = pl_module.device
        on_gpu = device.type == "cuda"
        others = [seconds for step, seconds in self._gaps.items() if step != self.saves_at]
        saving = self._gaps.get(self.saves_at)
        if saving is not None and others:
            saving -= median(others)
        found = {
            "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
            "stages": self._stages,
            "begun_at": self._begun_at,
            "ended_at": trainer.global_step,
            "position": self._position,
            "blocks": self._blocks,
            "saving": saving,
            "losses": [float(loss) for loss in self._losses],
            "sums": [int(total) for total in self._sums],
            "peak_gib": peak_memory(device),
            "reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30 if on_gpu else None,
        }
        write_json(self.folder / f"clock-{trainer.global_rank}.json", found)
