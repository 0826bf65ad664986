"""Speed and memory of a run, and how full its batches are."""

import sys
import time
from collections import Counter, deque

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moka_pl.data.types import Batch, data_of

#: What the progress bar calls what is counted.
_SHORT = {"tokens": "tok", "images": "img"}


class Throughput(Callback):
    """Logs tokens or images per second over all ranks, and the peak memory of this process or GPU.

    Padding is not counted. The progress bar shows the recent speed.

    Tags:
        ``train/tokens_per_second`` (of images ``train/images_per_second``), ``train/peak_memory_gib``.

    Args:
        window: Number of batches to average the shown speed over.

    Attributes:
        unit: What is counted: ``tokens``, or ``images``.
    """

    unit: str = "tokens"

    def __init__(self, window: int = 20) -> None:
        self.window = window
        self.total_tokens = 0
        self.train_seconds = 0.0
        self._recent: deque[tuple[float, int]] = deque(maxlen=window)
        self._started = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Mean training speed of this process, including data loading, excluding validation."""
        return self.total_tokens / self.train_seconds if self.train_seconds else 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    # A run that is resumed within an epoch has a start, but no start of an epoch.
    on_train_epoch_start = on_validation_end = on_train_start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Measures the time since the last batch, and logs.

        It measures from end to end, because a GPU still computes after a batch's calls return.
        """
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        self.unit = "images" if "pixel_values" in batch else "tokens"
        tokens = int(batch.get("num_examples" if "pixel_values" in batch else "num_tokens", 0))
        self.total_tokens += tokens
        self.train_seconds += seconds
        self._recent.append((seconds, tokens))
        speed = sum(t for _, t in self._recent) / max(1e-9, sum(s for s, _ in self._recent))
        # Every rank works on an equal share, so this rank's speed times their number is the whole speed.
        whole = speed * trainer.world_size
        log_number(pl_module, f"{_SHORT[self.unit]}/s", whole, prog_bar=True, logger=False)
        if trainer.global_step % log_interval(trainer) == 0:
            log_number(pl_module, f"train/{self.unit}_per_second", whole)
            log_number(pl_module, "train/peak_memory_gib", peak_memory(pl_module.device))


def log_number(
    pl_module: LightningModule, name: str, value: float, prog_bar: bool = False, logger: bool = True
) -> None:
    """Logs a number of the host's, which Lightning would copy to the GPU and wait for.

    Args:
        pl_module: The module, within one of its or a callback's hooks.
        name: The metric's name.
        value: The number.
        prog_bar: Whether the progress bar shows it.
        logger: Whether loggers get it.
    """
    pl_module.log(name, torch.tensor(float(value), dtype=torch.float32), prog_bar=prog_bar, logger=logger)


def log_interval(trainer: Trainer) -> int:
    """Returns the optimizer steps between two logs (the trainer's ``log_every_n_steps``, at least 1)."""
    return int(getattr(trainer, "log_every_n_steps", 0)) or 1


def peak_memory(device: torch.device) -> float:
    """Returns the peak memory so far in GiB: allocated on the GPU, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # not on Windows
        import psutil

        return float(psutil.Process().memory_info().rss) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class BatchStatistics(Callback):
    """Logs padding, rows and examples of the training batches.

    Values cover this process's batches since the last log. Rows and examples are logged where they vary: of
    packed batches, and of batches by a budget of tokens.

    Tags:
        ``train/padding_share`` (0 to 1), ``train/rows`` and ``train/examples`` (per micro-batch; packed
        batches have more examples than rows).

    Attributes:
        tokens: Real tokens of all training batches of this process.
        padded_tokens: The same with the padding.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.padded_tokens = 0
        self._recent: Counter[str] = Counter()

    @property
    def padding_share(self) -> float:
        """Share of padding in all training batches of this process, 0 to 1."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Counts the batch, and logs."""
        if "num_tokens" not in batch:  # of another's data module
            return
        rows, width = batch["input_ids"].shape
        tokens, padded_tokens = batch["num_tokens"], rows * width
        self.tokens += tokens
        self.padded_tokens += padded_tokens
        recent = self._recent
        recent.update(
            batches=1, tokens=tokens, padded_tokens=padded_tokens, rows=rows, examples=batch["num_examples"]
        )
        if trainer.global_step % log_interval(trainer) == 0:
            log_number(pl_module, "train/padding_share", 1 - recent["tokens"] / recent["padded_tokens"])
            data = data_of(trainer)
            if data.packing or data.batch_order.get("max_tokens") is not None:
                log_number(pl_module, "train/rows", recent["rows"] / recent["batches"])
                log_number(pl_module, "train/examples", recent["examples"] / recent["batches"])
            recent.clear()
