"""What a fit would refuse only after its model is loaded, refused before."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from moka_pl.data.base import MokaDataModule
from moka_pl.errors import ConfigError

#: Smallest whole numbers of options of which Lightning takes any, to fail in the middle of a run.
_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "max_epochs": -1,
    "max_steps": -1,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
    "val_check_interval": 0,
}
#: Of these, values with which nothing would be trained or checked.
_NOTHING = {"max_epochs": 0, "max_steps": 0, "val_check_interval": 0, "limit_train_batches": 0}

_MOST_DEVICES = 128


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses numbers among a trainer's options that Lightning accepts and cannot use.

    Raises:
        ConfigError: Naming the option and its value.
    """
    for name, least in _LEAST.items():
        value = options.get(name)
        if isinstance(value, int | float) and not value >= least:  # NaN is neither
            raise ConfigError(f"trainer.{name} must be {least} or more, not {value}")
    for name, nothing in _NOTHING.items():
        if options.get(name) == nothing:
            raise ConfigError(f"trainer.{name} is {nothing}: nothing would be trained or validated; raise it")
    devices = str(options.get("devices"))
    if devices.isdigit() and int(devices) > _MOST_DEVICES:
        raise ConfigError(f"trainer.devices is {devices}; no machine has so many, and each is a process")


def check_trainer(trainer: Trainer) -> None:
    """Refuses a validation interval that no epoch reaches, and epochs without a batch.

    Raises:
        ConfigError: Naming the option and the number of batches.
    """
    interval, data = trainer.val_check_interval, trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, MokaDataModule) or data.streaming:
        return
    limit = trainer.limit_train_batches
    if isinstance(limit, float) and 0 < limit < 1 and data.epoch_length() == 0:
        raise ConfigError(
            f"trainer.limit_train_batches {limit:g} of an epoch is less than one batch; raise it"
        )
    if not isinstance(interval, int) or interval == 1 or trainer.check_val_every_n_epoch is None:
        return
    if trainer.limit_val_batches == 0:
        return
    batches = data.epoch_length()
    if interval > batches:
        raise ConfigError(
            f"trainer.val_check_interval is {interval}, but an epoch has {batches} batches. Set it to "
            f"{batches} at most, to a share such as 0.5, or set trainer.check_val_every_n_epoch to null to "
            "count the batches of all epochs"
        )
