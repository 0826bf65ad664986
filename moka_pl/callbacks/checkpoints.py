"""Saves the best and the last adapter of a run, and the checkpoints to resume it from."""

import math
import operator
import os
import shutil
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from moka_pl._compat import save_last_checkpoint
from moka_pl.adapters import adapter_state, read_adapter, save_adapter
from moka_pl.callbacks.monitors import check_monitor
from moka_pl.data.types import data_of
from moka_pl.errors import AdapterError, MokaError, NonFiniteError, listed
from moka_pl.ops.finite import non_finite_names
from moka_pl.training.accidents.memory import StepMemoryError, release
from moka_pl.training.checkpoint import LAST_NAME, VERSION_KEY
from moka_pl.training.course import main_settings
from moka_pl.training.module import MokaModule
from moka_pl.training.preflight import Kept
from moka_pl.training.trainer_state import between_steps, epoch_ends, in_training, is_trial
from moka_pl.training.writing.checkpoint_files import is_remote
from moka_pl.training.writing.whole_files import check_writing, finish_writing, same_moment
from moka_pl.utils import expanded, replaced_folder, warn, write_failure


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
        self.best_step: int | None = None
        self.last_path: Path | None = None
        self._folder: Path | None = None
        self._log_dir: Path | None = None
        self._begun_at = 0
        self._validation: str | None = None
        self._resumed_from: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets the folder (on every rank: the log folder's name is broadcast)."""
        log_dir = trainer.log_dir
        self._folder = expanded(self.dirpath or Path(log_dir or trainer.default_root_dir, "adapters"))
        self._log_dir = Path(log_dir) if log_dir and trainer.is_global_zero and trainer.loggers else None
        self._validation = validation_name(trainer) if stage == "fit" else None

    def keeps(self) -> Kept | None:
        """Returns what is written: the best and the last adapter, and one more while it is."""
        return None if self._folder is None else Kept("adapters.dirpath", self._folder, adapters=3)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last adapter, and also the best one if the metric improved."""
        if not in_training(trainer):
            return
        check_monitor(trainer, "adapters.monitor", self.monitor)
        if is_trial(trainer):
            return
        score = float(trainer.callback_metrics[self.monitor])
        self.last_path = self._save(trainer, pl_module, "last")
        if not math.isfinite(score):
            warn(
                f"{self.monitor} is {score} after step {trainer.global_step}, which never counts as the best"
            )
            return
        better = operator.lt if self.mode == "min" else operator.gt
        if self.best_score is None or better(score, self.best_score):
            self.best_score, self.best_step = score, trainer.global_step
            self.best_path = self._save(trainer, pl_module, "best")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies the best adapter of a resumed run into this run's folder, if that is another one.

        Notes the step from which on there is something to save, too.
        """
        self._begun_at = trainer.global_step
        if self._log_dir is not None and not self._log_dir.is_dir():  # remote, or of a logger without files
            self._log_dir = None
        if self.best_path is None or self._folder is None or is_trial(trainer):
            return
        best = self._folder / "best"
        if best.exists() or best == self.best_path:
            return
        try:
            if trainer.is_global_zero:
                with replaced_folder(best) as new:
                    shutil.copytree(self.best_path, new)
        except OSError as error:
            reason = write_failure(error, self._folder)
            raise AdapterError(
                f"cannot copy the best adapter {self.best_path} to {best}: {reason}. Free some "
                "space, and copy it"
            ) from error
        self.best_path = best

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last adapter, as steps may have followed the last validation."""
        if not is_trial(trainer):
            self.last_path = self._save(trainer, pl_module, "last")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Makes the run's log folder again if it was deleted: TensorBoard's writer would fail without it."""
        if self._log_dir is not None and not self._log_dir.is_dir():
            self._log_dir.mkdir(parents=True, exist_ok=True)
            warn(f"{self._log_dir} was deleted during the run; it is made again")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves the last adapter of a run that was interrupted or failed.

        One that gives no finite loss any more does not replace an older one.
        """
        if trainer.state.fn != "fit" or is_trial(trainer) or trainer.global_step <= self._begun_at:
            return
        assert self._folder is not None
        if isinstance(exception, StepMemoryError):
            release(exception)
            if not exception.usable:
                return
        if (
            isinstance(exception, NonFiniteError)
            and not exception.usable
            and (self._folder / "last").exists()
        ):
            return
        try:
            self.last_path = self._save(trainer, pl_module, "last")
        except MokaError:
            if isinstance(exception, KeyboardInterrupt):
                raise
            return  # the run's own error says more
        if self.last_path is not None:
            rank_zero_info(f"Adapter of step {trainer.global_step} saved in {self.last_path}")

    def state_dict(self) -> dict[str, Any]:
        """Returns the best score, what it is a score of, and the path and step of its adapter."""
        return {
            "best_score": self.best_score,
            "best_path": None if self.best_path is None else str(self.best_path),
            "best_step": self.best_step,
            "monitor": self.monitor,
            "mode": self.mode,
            "validation": self._validation,
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes where the checkpoint lies, which may have moved with its run."""
        path = trainer.ckpt_path
        self._resumed_from = None if path is None or is_remote(path) else Path(path)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best score of the resumed run, unless it is of something else or has no adapter."""
        if state_dict["best_score"] is None:
            return
        for name, value in (("monitor", self.monitor), ("mode", self.mode)):
            if (stored := state_dict.get(name, value)) != value:
                self._say_anew(f"the best so far was chosen by {name} {stored}, now by {value}")
                return
        if self._validation is not None and state_dict.get("validation") not in (None, self._validation):
            self._say_anew("the best so far was chosen on other validation data")
            return
        path = self._find_best(Path(state_dict["best_path"]), state_dict.get("best_step"))
        if path is None:
            self._say_anew(f"{state_dict['best_path']}, the best so far, is not there")
            return
        self.best_score, self.best_step = state_dict["best_score"], state_dict.get("best_step")
        self.best_path = path

    def _say_anew(self, reason: str) -> None:
        if self._validation is not None:  # evaluations choose nothing
            rank_zero_info(f"the choice of the best adapter begins anew: {reason}")

    def _find_best(self, stored: Path, step: int | None) -> Path | None:
        """Returns where the best adapter is: beside the checkpoint, in this run's folder, or where it was."""
        places = [] if self._folder is None else [self._folder / "best"]
        if self._resumed_from is not None:
            places.insert(0, Path(os.path.normpath(self._resumed_from.parent / "../adapters/best")))
        for path in (*places, stored):
            try:
                if step in (None, read_adapter(path).extra.get("step")):
                    return path
            except AdapterError:
                continue
        return None

    def _save(self, trainer: Trainer, pl_module: LightningModule, name: str) -> Path | None:
        """Saves an adapter if it is finite; returns the path, or None if no adapter is there."""
        assert isinstance(pl_module, MokaModule)
        assert self._folder is not None
        path = self._folder / name
        if bad := non_finite_names(adapter_state(pl_module.causal_lm)):
            warn(
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
                **pl_module.adapter_extra,
                "data": data_of(trainer).source,
                "training": main_settings(pl_module.course),
            }
            save_adapter(path, pl_module.causal_lm, pl_module.adapter, pl_module.base, extra)
        return path


def validation_name(trainer: Trainer) -> str:
    """Names the data that a validation's metrics are of."""
    return f"{data_of(trainer).validation_digest} {trainer.limit_val_batches}"


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which also writes ``last.ckpt`` at the end of each epoch and of the run.

    Lightning (2.6) writes nothing then if ``every_n_train_steps`` or ``train_time_interval`` is set, or after
    the last of several validations in an epoch.

    It writes only between optimizer steps, and only there does a run stop early: a checkpoint holds no
    gradients. What is due within an accumulated batch waits for the step.

    The checkpoints store the version of the run's logs, which a custom ``dirpath`` does not reveal.
    """

    _version: int | str | None = None
    _validation: str | None = None
    _to_stop = False
    _validated = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets the folder, and notes the version of the logs."""
        with warnings.catch_warnings():
            # Whose it is shows once a checkpoint is loaded.
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        self._to_stop = self._validated = False  # of a fit that failed within a step
        self._version = trainer.logger.version if trainer.logger is not None else None
        self._validation = validation_name(trainer) if stage == "fit" else None

    def keeps(self) -> Kept | None:
        """Returns what is written: the best and the last checkpoint, and one more while it is."""
        if not self.dirpath or is_remote(self.dirpath):
            return None
        best = max(self.save_top_k, 0) if self.monitor is not None else min(abs(self.save_top_k), 1)
        return Kept("checkpoint.dirpath", Path(self.dirpath), checkpoints=best + bool(self.save_last) + 1)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns of what another run has left in the folder; that of a run which goes on is its own."""
        folder = None if not self.dirpath or is_remote(self.dirpath) else Path(self.dirpath)
        if trainer.ckpt_path is not None or folder is None or is_trial(trainer):
            return
        if names := sorted(file.name for file in folder.glob("*.ckpt")):
            warn(
                f"checkpoint.dirpath {folder} holds another run's {listed(names, 2)}: files of the same name "
                "are replaced. To keep them, choose another folder"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns Lightning's state and the version of the logs."""
        return super().state_dict() | {VERSION_KEY: self._version, "validation": self._validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the best checkpoints that are there and were chosen on the same validation data."""
        super().load_state_dict(state_dict)
        if self._validation is None:  # evaluations choose nothing
            return
        there = all(is_remote(path) or Path(path).is_file() for path in self.best_k_models)
        same = state_dict.get("validation") in (None, self._validation)
        if not there or (self.monitor is not None and not same):
            rank_zero_info(
                "the choice of the best checkpoints begins anew: files are gone, or validation data new"
            )
            self.best_model_score, self.best_k_models = None, {}
            self.kth_best_model_path = ""
        best = self.best_model_path
        if best and not is_remote(best) and not Path(best).is_file():
            self.best_model_path = ""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves at the chosen interval, but only between optimizer steps, and after the last step."""
        check_writing(trainer)
        self._put_off_stop(trainer)
        # In a resumed run Lightning would save again in the middle of the first accumulated batch.
        if not between_steps(trainer):
            return
        with self._moment(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if self._validated:
                super().on_validation_end(trainer, pl_module)
                self._validated = False
        self._save_end(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after a validation, or at the end of its step; after the last step it saves again."""
        check_writing(trainer)
        self._put_off_stop(trainer)
        if in_training(trainer) and not between_steps(trainer):
            self._validated = True
            return
        with self._moment(trainer):
            super().on_validation_end(trainer, pl_module)
        self._save_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves at the end of an epoch, unless the run stops within it."""
        if epoch_ends(trainer):
            with self._moment(trainer):
                super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits until all is written. In a trial run (``fast_dev_run``) nothing is, unlike Lightning's."""
        if not is_trial(trainer):
            super().on_train_end(trainer, pl_module)
        finish_writing(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Waits until all is written that an interrupted or failed run has begun to write."""
        try:
            finish_writing(trainer)
        except (MokaError, OSError):
            if isinstance(exception, KeyboardInterrupt):
                raise
        super().on_exception(trainer, pl_module, exception)

    def file_exists(self, filepath: str | Path, trainer: Trainer) -> bool:
        """Tells whether a file is there, or will be once all is written."""
        finish_writing(trainer)
        return super().file_exists(filepath, trainer)

    def _moment(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Writes while training goes on, unless Lightning or a logger expects the file to be there."""
        hooks = {type(logger).after_save_checkpoint for logger in trainer.loggers}
        idle = hooks <= {Logger.after_save_checkpoint, TensorBoardLogger.after_save_checkpoint}
        local = self.dirpath is not None and not is_remote(self.dirpath)
        return same_moment(trainer, background=idle and local and self.save_last != "link")

    def _put_off_stop(self, trainer: Trainer) -> None:
        """Takes back a wish to stop within an optimizer step, and renews it at the step's end."""
        if not in_training(trainer):
            return
        wished = self._to_stop or trainer.should_stop
        trainer.should_stop = wished and between_steps(trainer)
        self._to_stop = wished and not trainer.should_stop

    def _save_end(self, trainer: Trainer) -> None:
        if not in_training(trainer) or is_trial(trainer):
            return
        if trainer.should_stop or epoch_ends(trainer) or -1 < trainer.max_steps <= trainer.global_step:
            save_last_checkpoint(self, trainer)


def last_path(trainer: Trainer) -> str:
    """Returns the path of the run's ``last.ckpt``: beside its other checkpoints, if any."""
    saving = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    # Ours before the user's: ``--ckpt_path last`` looks there.
    saving.sort(key=lambda callback: not isinstance(callback, RunCheckpoint))
    folder = (
        saving[0].dirpath if saving else Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
    )
    return f"{folder}/{LAST_NAME}"  # not a Path: it may be a remote address
