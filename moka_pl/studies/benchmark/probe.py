"""What a benchmarked ``fit`` is given: a callback that times it, and synthetic data.

Around the ``fit`` the callback times a bare loop over the same model and batches.
"""

import os
import random
from itertools import islice, pairwise
from pathlib import Path
from typing import ClassVar, Optional

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moka_pl.data import EncodingReport, MokaDataModule
from moka_pl.data.encoding.examples import Encoded
from moka_pl.lm.scoring import score_tokens
from moka_pl.studies.benchmark.startup import Stopwatch
from moka_pl.studies.benchmark.steps import synchronise
from moka_pl.studies.common import Moment, peak_gib, reset_peak, write_json
from moka_pl.training.module import MokaModule

#: Different batches that the bare loop takes in turn.
_BATCHES = 8


class Probe(Callback):
    """Measures optimizer steps of ``fit`` from the end of one batch to the end of the next.

    Half of the bare loop's steps run before training and half after it, so that a machine that grows slower
    or faster meanwhile does not look like a cost of the framework.

    Args:
        warmup: Optimizer steps before the measured ones.
        steps: Measured optimizer steps.

    Attributes:
        latest: The probe that was built last: the command line builds it, and the benchmark asks here.
        fit_ms: Milliseconds of each measured step of ``fit``.
        bare_ms: Milliseconds of each step of the bare loop.
        peak: Peak memory of ``fit``, GiB.
        trainable: Number of trainable parameters.
    """

    latest: ClassVar[Optional["Probe"]] = None

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.steps = warmup, steps
        self.fit_ms: list[float] = []
        self.bare_ms: list[float] = []
        self.peak = 0.0
        self.trainable = 0
        self._ends: list[Moment] = []
        Probe.latest = self

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs the first half of the bare loop."""
        self.trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        self.bare_ms += self._bare(trainer, pl_module)
        reset_peak(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Notes the moment, in the GPU's queue where there is one, and waits for nothing."""
        self._ends.append(Moment(pl_module.device))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs the second half of the bare loop, while the model is still on its device."""
        self.peak = peak_gib(pl_module.device)
        self.fit_ms = [after.ms_since(before) for before, after in pairwise(self._ends[self.warmup - 1 :])]
        self.bare_ms += self._bare(trainer, pl_module)

    def _bare(self, trainer: Trainer, pl_module: LightningModule) -> list[float]:
        """Forward, backward and AdamW on batches that lie on the device already."""
        assert isinstance(pl_module, MokaModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, MokaDataModule)
        device = pl_module.device
        batches = [
            (batch["input_ids"].to(device), batch["labels"].to(device))
            for batch in islice(data.train_dataloader(), _BATCHES)
        ]
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)
        measured = max(2, self.steps // 2)
        ends = []
        with torch.enable_grad():
            for step in range(self.warmup + measured):
                ids, labels = batches[step % len(batches)]
                torch.autograd.backward(score_tokens(pl_module.causal_lm, ids, labels).nll.mean())
                optimizer.step()
                optimizer.zero_grad()
                ends.append(Moment(device))
        return [after.ms_since(before) for before, after in pairwise(ends[self.warmup - 1 :])]


class Clock(Callback):
    """Takes the time of a fit's parts up to its first optimizer step, writes them, and ends the process.

    Args:
        file: A JSON file for the seconds by part.
    """

    def __init__(self, file: str) -> None:
        Stopwatch.lap("parsing")
        self.file = Path(file)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends the part of the data, which are prepared before."""
        Stopwatch.lap("data")

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the part of the trainer's preparations."""
        Stopwatch.lap("trainer")

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the validation before training."""
        Stopwatch.lap("validation before training")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Ends the trainer's preparations, once the first batch is there."""
        if batch_idx == 0:
            Stopwatch.lap("trainer")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Writes the parts after the first optimizer step; nothing that follows is wanted."""
        if trainer.global_step:
            synchronise(pl_module.device)
            Stopwatch.lap("first step")
            write_json(self.file, Stopwatch.parts)
            os._exit(0)


#: Ids that every tokenizer and vocabulary has.
_FIRST, _LAST = 4, 259


class SyntheticData(MokaDataModule):
    """Training rows of exactly ``length`` random tokens, all of them trained on; no validation.

    Args:
        batch_size: Examples per device and micro-batch.
        length: Tokens of every example.
        batches: Batches of an epoch.
        num_workers: Processes per device that load batches.
        seed: Seed of the tokens and of the shuffling.
    """

    name = "synthetic"

    def __init__(
        self, batch_size: int = 8, length: int = 512, batches: int = 100, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__(batch_size=batch_size, max_length=max(2, length), num_workers=num_workers, seed=seed)
        self.length = length
        self.batches = batches

    def encode(self, split: str) -> Encoded | None:
        """Draws the training rows; there are no others."""
        if split != "train":
            return None
        from datasets import Dataset

        draw = random.Random(self.seed)
        count = self.batch_size * self.batches
        rows = [[draw.randint(_FIRST, _LAST) for _ in range(self.length)] for _ in range(count)]
        sizes = [self.length] * count
        table = Dataset.from_dict(
            {"input_ids": rows, "labels": rows, "length": sizes, "padded_tokens": sizes}
        )
        tokens = count * self.length
        report = EncodingReport(
            read=count,
            kept=count,
            truncated=0,
            dropped=0,
            tokens=tokens,
            trained=tokens - count,
            longest=self.length,
        )
        return Encoded(table, report)
