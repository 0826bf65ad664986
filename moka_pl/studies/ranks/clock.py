"""A clock within the measured trainings."""

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moka_pl.callbacks.throughput import log_interval, peak_memory
from moka_pl.lm.scoring import IGNORE_INDEX
from moka_pl.studies.benchmark.steps import synchronise
from moka_pl.studies.common import write_json
from moka_pl.studies.ranks.cases import BLOCK
from moka_pl.studies.ranks.profile import StepProfile
from moka_pl.studies.ranks.step_times import StepTimes, step_seconds


class StepClock(Callback):
    """Takes the times of a training, and writes them beside those of the other ranks when it ends.

    The file of each rank holds the seconds since the epoch of 1970 of the command's stages (``imported``,
    ``built``, ``first_step``), tokens and seconds of each block of steps after the first ones, the parts of
    every step (see :class:`~moka_pl.studies.ranks.step_times.StepTimes`), the seconds that the checkpoint
    took from the training, and losses, rows and the step at which it began. But for the first step and
    the end, the clock never waits for the GPU: it measures what a training without it does. A block counts
    from the end of a step to the end of another, as the GPU sees it, and so contains logging, loading and all
    other callbacks; blocks have as many steps as lie between two logs, so that one step of each is logged.

    Args:
        folder: Where to write ``clock-RANK.json``.
        warmup: Optimizer steps at the beginning that do not count.
        saves_at: The step whose checkpoint is timed.
        profile: A folder for profiles of as many of the first rank's last steps as two blocks have, which are
            slower for it.
    """

    def __init__(self, folder: str, warmup: int, saves_at: int, profile: str | None = None) -> None:
        self.folder, self.warmup, self.saves_at = Path(folder), warmup, saves_at
        self.profile = profile
        self._stages = {"imported": time.time()}
        self._begun_at = 0
        self._position: list[int] = []
        self._tokens: list[int] = []
        self._sums: list[Tensor] = []
        self._times = StepTimes(torch.device("cpu"))
        self._profile: StepProfile | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes where the training begins."""
        self._stages["built"] = time.time()
        self._begun_at = trainer.global_step
        self._position = [trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready]
        if self.profile is not None and trainer.is_global_zero:
            length = min(BLOCK, (self.saves_at - 2) // 2)  # a resumed training is short
            self._profile = StepProfile(Path(self.profile), self.saves_at - 1 - 2 * length, length)
        self._times = StepTimes(pl_module.device)
        self._times.mark()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begins a step."""
        self._times.mark()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Ends the forward pass."""
        self._times.mark()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Ends the backward pass, with the sum over ranks."""
        self._times.mark()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends a step; callbacks that log and that write files come later."""
        step = trainer.global_step - self._begun_at
        self._times.end_step(logs=trainer.global_step % log_interval(trainer) == 0)
        self._tokens.append(batch["num_tokens"])
        scored = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        # Numbers of the GPU are read at the end: the trainer's own metrics would be waited for.
        self._sums.append(
            torch.stack([outputs["loss"].double(), scored.double(), batch["input_ids"].sum().double()])
        )
        if step == 1:
            synchronise(pl_module.device)
            self._stages["first_step"] = time.time()
        if self._profile is not None:
            self._profile.end_step(step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what was measured."""
        device = pl_module.device
        on_gpu = device.type == "cuda"
        steps = self._times.collect()
        sums = torch.stack(self._sums).tolist()
        found = {
            "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
            "stages": self._stages,
            "begun_at": self._begun_at,
            "ended_at": trainer.global_step,
            "position": self._position,
            "blocks": self._blocks(step_seconds(steps)),
            "steps": steps,
            "saving": saving_seconds(steps, self.saves_at),
            "losses": [loss for loss, _, _ in sums],
            "scored": [int(scored) for _, scored, _ in sums],
            "sums": [int(total) for _, _, total in sums],
            "peak_gib": peak_memory(device),
            "reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30 if on_gpu else None,
        }
        write_json(self.folder / f"clock-{trainer.global_rank}.json", found)

    def _blocks(self, seconds: list[float]) -> list[tuple[int, float]]:
        """Returns tokens and seconds of each block."""
        begins = range(self.warmup, min(self.saves_at, len(seconds)) - BLOCK + 1, BLOCK)
        return [(sum(self._tokens[i : i + BLOCK]), sum(seconds[i : i + BLOCK])) for i in begins]


def saving_seconds(steps: dict[str, Any], saves_at: int) -> float | None:
    """Returns how much longer it took from a step to the next one than elsewhere, because of a checkpoint.

    Args:
        steps: What :meth:`StepTimes.collect` has returned.
        saves_at: The step that the checkpoint follows.

    Returns:
        None where the training did not come so far, or has no other step that is logged, or not, as that is.
    """
    between = (steps["gpu_ms"] or steps["host_ms"])["between"]
    after_log: list[bool] = steps["after_log"]
    if saves_at >= len(between):
        return None
    alike = [
        ms
        for step, (ms, logged) in enumerate(zip(between, after_log, strict=True))
        if 0 < step != saves_at and logged == after_log[saves_at]
    ]
    return (between[saves_at] - median(alike)) / 1e3 if alike else None
