"""Refuses a monitored metric that nothing logs, which would choose, stop or slow down nothing."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moka_pl.errors import ConfigError, listed

_SHOWN = 20


def check_monitor(trainer: Trainer, owner: str, monitor: str) -> None:
    """Refuses a metric that is not among those logged so far.

    Args:
        trainer: The trainer.
        owner: What monitors it, such as ``adapters.monitor``.
        monitor: The metric's name.

    Raises:
        ConfigError: It is not there; the message names those that are.
    """
    known = sorted(trainer.callback_metrics)
    if monitor in known:
        return
    near = get_close_matches(monitor, known, n=1)
    guess = f" Did you mean {near[0]}?" if near else ""
    shown = listed(known, _SHOWN)
    raise ConfigError(
        f"{owner} is {monitor!r}, but no metric has that name.{guess} There are: {shown or 'none'}"
    )


def validates_whole(trainer: Trainer) -> bool:
    """Whether this validation gives every metric of one: the first look at the data may be a short one."""
    return not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf")


class MonitorCheck(Callback):
    """Checks, at the end of the first validation, what callbacks and the scheduler monitor of it.

    The validation before the first step counts, if it is on all of the data (the command line's default).
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the names of validation metrics; others may be logged later."""
        if trainer.state.fn == "fit" and validates_whole(trainer):
            for owner, monitor in _monitors(trainer):
                if monitor.startswith(("val/", "test/")):
                    check_monitor(trainer, owner, monitor)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses to monitor a validation that never happens."""
        if trainer.limit_val_batches == 0:
            for owner, monitor in _monitors(trainer):
                if monitor.startswith("val/") and owner != "adapters.monitor":  # by default, too
                    raise ConfigError(
                        f"{owner} is {monitor!r}, but with trainer.limit_val_batches 0 there is no "
                        "validation. Validate, or monitor train/loss"
                    )


def _monitors(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Yields the owner and the name of every monitored metric."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    names = {"AdapterCheckpoint": "adapters.monitor", "RunCheckpoint": "checkpoint.monitor"}
    for callback in callbacks:
        if isinstance(monitor := getattr(callback, "monitor", None), str):
            kind = type(callback).__name__
            yield names.get(kind, f"the monitor of {kind}"), monitor
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.monitor is not None:
            yield "the monitor of ReduceLROnPlateau", config.monitor
