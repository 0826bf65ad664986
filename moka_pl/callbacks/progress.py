"""The progress bar."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """Lightning's bar (elapsed and remaining time, batches/s) with loss, tokens/s and validation metrics."""

    @property
    def sanity_check_description(self) -> str:
        """What the validation before the first step is: the frozen base on its own, if nothing is resumed."""
        return "Before going on" if self.trainer.global_step else "Frozen base, before training"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The shown metrics, without the logger's version."""
        items = dict(super().get_metrics(trainer, pl_module))
        items.pop("v_num", None)
        speed = items.get("tok/s")
        if isinstance(speed, float):
            items["tok/s"] = f"{speed:,.0f}"
        return items
