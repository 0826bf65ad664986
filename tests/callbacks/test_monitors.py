from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from moka_pl.callbacks import AdapterCheckpoint, MonitorCheck, RunCheckpoint
from moka_pl.callbacks.monitors import check_monitor
from moka_pl.errors import ConfigError


def trainer_with(**changes):
    found = dict.fromkeys(["val/loss", "val/accuracy", "train/loss"], torch.tensor(1.0))
    state = {
        "callback_metrics": found,
        "callbacks": [],
        "lr_scheduler_configs": [],
        "limit_val_batches": 1.0,
        "sanity_checking": False,
        "num_sanity_val_steps": 2,
        "state": SimpleNamespace(fn="fit"),
    }
    return SimpleNamespace(**(state | changes))


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        ("val/acuracy", r"Did you mean val/accuracy\? There are: train/loss, val/accuracy, val/loss$"),
        ("accuracy", r"Did you mean val/accuracy\?"),
        ("test/loss", "There are: train/loss"),
        ("nothing", r"no metric has that name\. There are"),
        ("", "is '', but"),
    ],
)
def test_names_what_there_is(monitor, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_monitor(trainer_with(), "adapters.monitor", monitor)
    assert "\n" not in str(caught.value)
    check_monitor(trainer_with(), "adapters.monitor", "train/loss")


@pytest.mark.parametrize(
    ("callback", "owner"),
    [
        (AdapterCheckpoint("val/los"), "adapters.monitor"),
        (RunCheckpoint(monitor="val/los"), "checkpoint.monitor"),
        (EarlyStopping("val/los"), "the monitor of EarlyStopping"),
        (None, "the monitor of ReduceLROnPlateau"),
    ],
)
def test_all_that_monitor_are_checked_after_the_first_validation(callback, owner):
    if callback is None:
        plateau = SimpleNamespace(reduce_on_plateau=True, monitor="val/los")
        trainer = trainer_with(lr_scheduler_configs=[plateau])
    else:
        trainer = trainer_with(callbacks=[callback])
    check = MonitorCheck()
    with pytest.raises(ConfigError, match=rf"^{owner} is 'val/los', but .* Did you mean val/loss\?"):
        check.on_validation_end(trainer, None)
    trainer.sanity_checking = True
    check.on_validation_end(trainer, None)  # two batches need not give every metric
    trainer.num_sanity_val_steps = float("inf")
    with pytest.raises(ConfigError, match="val/los"):
        check.on_validation_end(trainer, None)
    trainer.limit_val_batches = 0
    if owner != "adapters.monitor":
        with pytest.raises(ConfigError, match="there is no validation"):
            check.on_fit_start(trainer, None)


def test_metrics_logged_later_are_left_to_what_monitors_them():
    callbacks = [EarlyStopping("train/loss_epoch"), AdapterCheckpoint(), Callback()]
    MonitorCheck().on_validation_end(trainer_with(callbacks=callbacks), None)
    MonitorCheck().on_fit_start(trainer_with(callbacks=callbacks, limit_val_batches=0), None)


@pytest.mark.slow
def test_a_run_ends_with_the_first_validation(train):
    with pytest.raises(ConfigError, match=r"adapters.monitor is 'val/acc_nrom'"):
        train(AdapterCheckpoint("val/acc_nrom"), max_epochs=1, limit_train_batches=1)
