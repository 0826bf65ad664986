"""The progress bar."""

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

#: Seconds between two updates of the bar, unless a refresh rate is asked for.
_PAUSE = 1.0


class ProgressBar(TQDMProgressBar):
    """Lightning's bar (elapsed and remaining time, batches/s) with loss, tokens/s and validation metrics.

    The bar updates once a second and at the end. Nothing that it shows of training is read from the GPU: of
    the loss it shows the last value that has arrived.

    Args:
        refresh_rate: Batches between two updates; 0 hides the bar, 1 updates it once a second.
        **options: Options of Lightning's bar.
    """

    def __init__(self, refresh_rate: int = 1, **options: Any) -> None:
        super().__init__(refresh_rate=refresh_rate, **options)
        self._shown = 0.0

    @property
    def sanity_check_description(self) -> str:
        """Label of the validation before the first step, of the frozen base or the resumed model."""
        return "Before resuming" if self.trainer.global_step else "Frozen base, before training"

    def on_train_start(self, trainer: Trainer, *of_module: Any) -> None:
        """Begins the bar; where a run resumes in the middle of an epoch, there, which Lightning does not."""
        super().on_train_start(trainer, *of_module)
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if not done:
            return
        bar, total = self.train_progress_bar, self.total_train_batches
        bar.reset(total=None if math.isinf(total) else total)
        bar.initial = bar.n = done
        bar.set_description(f"Epoch {trainer.current_epoch}")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Returns the shown metrics, without the logger's version."""
        items = dict(super().get_metrics(trainer, pl_module))
        items.pop("v_num", None)
        for name in ("tok/s", "img/s"):
            if isinstance(speed := items.get(name), float):
                items[name] = f"{speed:,.0f}"
        return items

    def _should_update(self, current: int, total: int) -> bool:
        if not super()._should_update(current, total):
            return False
        now = time.monotonic()
        if self.refresh_rate == 1 and current != total and now - self._shown < _PAUSE:
            return False
        self._shown = now
        return True
