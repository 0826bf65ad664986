import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from moka_pl.adapters import moka_layers
from moka_pl.backbone import BackboneConfig
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.errors import ConfigError, MokaWarning
from moka_pl.ops.thin import is_thin


def saving(folder, **options):
    """Keeps every checkpoint under the number of its step."""
    return ModelCheckpoint(
        dirpath=folder, save_top_k=-1, filename="{step}", auto_insert_metric_name=False, **options
    )


pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({}, (1, 4)),
        ({"val_check_interval": 4}, (1, 5)),  # validation at a step in the middle of an epoch
        ({"val_check_interval": 3}, (1, 2)),  # in the middle of an accumulated batch
        ({"limit_val_batches": 0}, (4,)),
        ({"max_steps": 7, "max_epochs": -1}, (3,)),
        ({"limit_train_batches": 5}, (2, 3)),  # epochs of three steps
    ],
    ids=str,
)
def test_resumed_run_equals_one_never_stopped(train, assert_continues, tmp_path, options, stops):
    whole = train(saving(tmp_path, every_n_train_steps=1), **options)
    assert len(whole.losses) == options.get("max_steps", 6 if "limit_train_batches" in options else 8)
    for step in stops:
        resumed = train(ckpt_path=tmp_path / f"{step}.ckpt", **options)
        assert_continues(resumed, whole, step)
        later = {k: v for k, v in whole.validations.items() if k > step}
        assert {k: v for k, v in resumed.validations.items() if k > step} == later


def test_a_run_of_thin_products_resumes(train, assert_continues, tmp_path):
    adapter = {"filters": "servable", "rank": 4, "components": 1, "target_modules": "all-linear"}
    whole = train(saving(tmp_path, every_n_train_steps=1), adapter=adapter, max_epochs=1)
    layers = moka_layers(whole.module.causal_lm).values()
    assert all(is_thin(layer.shapes, layer.out_features, layer.in_features) for layer in layers)
    assert_continues(train(ckpt_path=tmp_path / "2.ckpt", adapter=adapter, max_epochs=1), whole, 2)


def test_a_run_on_uneven_rows_resumes(train, assert_continues, make_llama, tmp_path):
    base = tmp_path / "base"
    sizes = {"vocab_size": 261, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1}
    make_llama(**sizes, max_position_embeddings=512).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    options = {"backbone": BackboneConfig(str(base), quantization="nf4"), "max_epochs": 1}
    whole = train(saving(tmp_path / "kept", every_n_train_steps=1), **options)
    assert_continues(train(ckpt_path=tmp_path / "kept/2.ckpt", **options), whole, 2)


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 4}], ids=str)
def test_resume_from_a_checkpoint_of_a_validation(train, assert_continues, tmp_path, options):
    whole = train(saving(tmp_path), **options)
    steps = list(whole.validations)
    assert steps == ([2, 6] if options else [4, 8])
    assert {path.stem for path in tmp_path.glob("*.ckpt")} == set(map(str, steps))
    resumed = train(ckpt_path=tmp_path / f"{steps[0]}.ckpt", **options)
    assert_continues(resumed, whole, steps[0])
    assert resumed.validations == {steps[1]: whole.validations[steps[1]]}


def test_a_checkpoint_that_another_callback_wrote_within_a_step_is_told(train, tmp_path):
    train(saving(tmp_path), val_check_interval=3, max_epochs=1)  # of steps of two batches
    with pytest.warns(MokaWarning, match="within an optimizer step: the gradient of 1 batch is lost"):
        train(ckpt_path=tmp_path / "1.ckpt", val_check_interval=3, max_epochs=1)


def test_longer_run_stretches_the_schedule(train, tmp_path):
    train(saving(tmp_path), max_epochs=1)
    whole = train(max_epochs=3)
    resumed = train(ckpt_path=tmp_path / "4.ckpt", max_epochs=3)
    assert resumed.rates == {k: v for k, v in whole.rates.items() if k > 4}
    assert len(resumed.rates) == 8


def test_schedule_needs_an_end(make_module, make_data, make_trainer):
    with pytest.raises(ConfigError, match="needs the length of the run"):
        make_trainer(max_epochs=-1, limit_val_batches=0).fit(make_module(), make_data())
