"""How full the training batches are, and what became of the training examples."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moka_pl.callbacks.throughput import log_interval


class BatchStatistics(Callback):
    """Logs the padding, the rows and the examples of the training batches, and the lost examples.

    Values are those of this process's share of the batches since the last log.

    Tags:
        ``batch/padding_share`` (0 to 1), ``batch/rows`` and ``batch/examples`` (per micro-batch; more
        examples than rows where they are packed); once, at the start: ``data/examples``,
        ``data/truncated``, ``data/dropped``.

    Attributes:
        tokens: Real tokens of all training batches of this process.
        slots: The same with the padding.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.slots = 0
        self._recent = _Counts()

    @property
    def padding_share(self) -> float:
        """Share of padding in all training batches of this process, 0 to 1."""
        return 1 - self.tokens / self.slots if self.slots else 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what became of the examples."""
        report = getattr(getattr(trainer, "datamodule", None), "report", {}).get("train")
        if report is not None and trainer.global_step == 0:
            counts = {
                "data/examples": report.kept,
                "data/truncated": report.truncated,
                "data/dropped": report.dropped,
            }
            for logger in trainer.loggers:
                logger.log_metrics(counts, step=0)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: dict[str, Any],
        batch_idx: int,
    ) -> None:
        """Counts the batch, and logs."""
        if "num_tokens" not in batch:  # of another's data module
            return
        rows, width = batch["input_ids"].shape
        self.tokens += batch["num_tokens"]
        self.slots += rows * width
        self._recent.add(batch["num_tokens"], rows * width, rows, batch["num_examples"])
        if trainer.global_step % log_interval(trainer) == 0:
            for name, value in self._recent.means().items():
                pl_module.log(name, value)
            self._recent = _Counts()


class _Counts:
    """Sums over some batches."""

    def __init__(self) -> None:
        self.batches = self.tokens = self.slots = self.rows = self.examples = 0

    def add(self, tokens: int, slots: int, rows: int, examples: int) -> None:
        self.batches += 1
        self.tokens += tokens
        self.slots += slots
        self.rows += rows
        self.examples += examples

    def means(self) -> dict[str, float]:
        return {
            "batch/padding_share": 1 - self.tokens / self.slots,
            "batch/rows": self.rows / self.batches,
            "batch/examples": self.examples / self.batches,
        }
