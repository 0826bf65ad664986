"""Saves the best and the last adapter of a run, and the checkpoints to resume it from."""

import math
import operator
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from moka_pl._compat import save_last_checkpoint
from moka_pl.adapters import adapter_state, save_adapter
from moka_pl.data.types import data_of
from moka_pl.errors import MokaError, NonFiniteError
from moka_pl.ops.finite import non_finite_names
from moka_pl.training.checkpoint import VERSION_KEY
from moka_pl.training.module import MokaModule


class AdapterCheckpoint(Callback):
    """Writes ``adapters/best`` and ``adapters/last`` below the run's log folder.

    ``last`` is written after every validation and at the end, ``best`` whenever the monitored metric
    improves. They contain no frozen weights, and replace an older adapter only once complete. They store the
    metrics and the step of their validation (``metrics_step``).

    Args:
        monitor: Metric that selects the best adapter.
        mode: Whether a lower (``min``) or higher (``max``) metric is better.
        dirpath: Folder for both; ``null`` is ``adapters`` in the run's log folder.
    """

    def __init__(
        self, monitor: str = "val/loss", mode: Literal["min", "max"] = "min", dirpath: str | None = None
    ) -> None:
        self.monitor = monitor
        self.mode = mode
        self.dirpath = dirpath
        self.best_score: float | None = None
        self.best_path: Path | None = None
        self.last_path: Path | None = None
        self._folder: Path | None = None
        self._begun_at = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets the folder (on every rank: the log folder's name is broadcast)."""
        self._folder = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir, "adapters"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the step from which on there is something to save."""
        self._begun_at = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last adapter, and also the best one if the metric improved."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or is_trial(trainer):
            return
        score = float(trainer.callback_metrics.get(self.monitor, math.nan))
        self.last_path = self._save(trainer, pl_module, "last")
        if not math.isfinite(score):
            if self.monitor in trainer.callback_metrics:
                rank_zero_warn(f"{self.monitor} is {score} after step {trainer.global_step}: never the best")
            return
        better = operator.lt if self.mode == "min" else operator.gt
        if self.best_score is None or better(score, self.best_score):
            self.best_score = score
            self.best_path = self._save(trainer, pl_module, "best")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last adapter, as steps may have followed the last validation."""
        if not is_trial(trainer):
            self.last_path = self._save(trainer, pl_module, "last")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves the last adapter of a run that was interrupted or failed.

        One that gives no finite loss any more does not replace an older one.
        """
        if trainer.state.fn != "fit" or is_trial(trainer) or trainer.global_step <= self._begun_at:
            return
        if isinstance(exception, NonFiniteError) and not exception.usable and self.last_path is not None:
            return
        try:
            self.last_path = self._save(trainer, pl_module, "last")
        except MokaError:
            if isinstance(exception, KeyboardInterrupt):
                raise
            return  # the run's own error says more
        rank_zero_info(f"Adapter of step {trainer.global_step} saved in {self.last_path}")

    def state_dict(self) -> dict[str, Any]:
        """Returns the best score and the path of its adapter."""
        return {
            "best_score": self.best_score,
            "best_path": None if self.best_path is None else str(self.best_path),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best score of the resumed run."""
        self.best_score = state_dict["best_score"]
        self.best_path = None if state_dict["best_path"] is None else Path(state_dict["best_path"])

    def _save(self, trainer: Trainer, pl_module: LightningModule, name: str) -> Path | None:
        """Saves an adapter if it is finite; returns the path, or None if no adapter is there."""
        assert isinstance(pl_module, MokaModule)
        assert self._folder is not None
        path = self._folder / name
        if bad := non_finite_names(adapter_state(pl_module.causal_lm)):
            rank_zero_warn(
                f"the adapter of step {trainer.global_step} is not saved in {path}: {len(bad)} of its "
                f"tensors are not finite (first {bad[0]}). An older one stays"
            )
            return path if path.exists() else None
        if trainer.is_global_zero:
            assert pl_module.base is not None
            extra = {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "metrics": pl_module.eval_values,
                # Less than "step" where steps have followed the last validation.
                "metrics_step": pl_module.eval_step,
                "prompt": data_of(trainer).prompt,
            }
            save_adapter(path, pl_module.causal_lm, pl_module.adapter, pl_module.base, extra)
        return path


def is_trial(trainer: Trainer) -> bool:
    """Whether this is a trial run of a few batches (``fast_dev_run``)."""
    return bool(getattr(trainer, "fast_dev_run", False))


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which also writes ``last.ckpt`` at the end of each epoch and of the run.

    Lightning (2.6) writes nothing then if ``every_n_train_steps`` or ``train_time_interval`` is set, or after
    the last of several validations in an epoch.

    The checkpoints store the version of the run's logs, which a custom ``dirpath`` does not reveal.
    """

    _version: int | str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets the folder, and notes the version of the logs."""
        super().setup(trainer, pl_module, stage)
        self._version = trainer.logger.version if trainer.logger is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Returns Lightning's state and the version of the logs."""
        return super().state_dict() | {VERSION_KEY: self._version}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves at the chosen interval, but only between optimizer steps, and after the last step."""
        # In a resumed run Lightning would save again in the middle of the first accumulated batch.
        if between_steps(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._save_end(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after a validation; after the last step it saves again, with the metrics."""
        super().on_validation_end(trainer, pl_module)
        self._save_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves at the end of an epoch, unless the run stops within it."""
        if _epoch_ends(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes no file in a trial run (``fast_dev_run``), unlike Lightning."""
        if not is_trial(trainer):
            super().on_train_end(trainer, pl_module)

    def _save_end(self, trainer: Trainer) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or is_trial(trainer):
            return
        if trainer.should_stop or _epoch_ends(trainer) or -1 < trainer.max_steps <= trainer.global_step:
            save_last_checkpoint(self, trainer)


def between_steps(trainer: Trainer) -> bool:
    """Whether the batch that has just ended completed an optimizer step."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    if batches % trainer.accumulate_grad_batches == 0:
        return True
    return _epoch_ends(trainer) and not trainer.strategy.handles_gradient_accumulation


def _epoch_ends(trainer: Trainer) -> bool:
    """Whether the batch at hand is the last one of its epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return bool(progress.is_last_batch or progress.current.ready == trainer.num_training_batches)
