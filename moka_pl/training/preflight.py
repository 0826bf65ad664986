"""What a fit would refuse only after its model is loaded, refused before."""

from lightning.pytorch import Trainer

from moka_pl.data.base import MokaDataModule
from moka_pl.errors import ConfigError


def check_trainer(trainer: Trainer) -> None:
    """Refuses a validation interval that no epoch reaches.

    Raises:
        ConfigError: Naming the interval and the number of batches.
    """
    interval, data = trainer.val_check_interval, trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(interval, int) or interval == 1 or trainer.check_val_every_n_epoch is None:
        return
    if not isinstance(data, MokaDataModule) or data.streaming or trainer.limit_val_batches == 0:
        return
    batches = data.epoch_length()
    if interval > batches:
        raise ConfigError(
            f"trainer.val_check_interval is {interval}, but an epoch has {batches} batches. Set it to "
            f"{batches} at most, to a share such as 0.5, or set trainer.check_val_every_n_epoch to null to "
            "count the batches of all epochs"
        )
