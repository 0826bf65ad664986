import pytest

from moka_pl.errors import ConfigError
from moka_pl.training.preflight import check_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches must be 1 or more, not 0"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch must be 1"),
        ({"val_check_interval": 0}, "val_check_interval is 0: nothing"),
        ({"val_check_interval": -3}, "val_check_interval must be 0 or more, not -3"),
        ({"max_steps": 0}, "max_steps is 0: nothing would be trained"),
        ({"max_epochs": 0}, "max_epochs is 0"),
        ({"max_epochs": -7}, "max_epochs must be -1 or more"),
        ({"num_nodes": 0}, "num_nodes must be 1"),
        ({"num_sanity_val_steps": -2}, "num_sanity_val_steps must be -1"),
        ({"gradient_clip_val": float("nan")}, "gradient_clip_val must be 0 or more, not nan"),
        ({"limit_train_batches": 0.0}, "limit_train_batches is 0"),
        ({"devices": 100_000}, "trainer.devices is 100000"),
        ({"devices": "100000"}, "trainer.devices is 100000"),
    ],
    ids=str,
)
def test_numbers_that_train_nothing(options, message):
    with pytest.raises(ConfigError, match=message):
        check_options(options)


def test_common_options():
    check_options({"max_steps": -1, "max_epochs": -1, "devices": "auto", "val_check_interval": "00:15:00"})
    check_options({"max_epochs": None, "val_check_interval": 0.5, "gradient_clip_val": None, "devices": 8})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_check_interval": 100}, "val_check_interval is 100, but an epoch has 7 batches"),
        pytest.param(
            {"val_check_interval": 3, "limit_train_batches": 2},
            "is 3, but an epoch has 2 batches",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"limit_train_batches": 0.01},
            "limit_train_batches 0.01 of an epoch is less than one batch",
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_intervals_that_no_epoch_reaches(make_module, make_data, make_trainer, monkeypatch, options, message):
    module = make_module()
    monkeypatch.setattr(type(module), "load_base", lambda self: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=message):
        make_trainer(**options).fit(module, make_data())
