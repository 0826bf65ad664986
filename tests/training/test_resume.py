from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from moka_pl.adapters import moka_layers
from moka_pl.backbone import BackboneConfig
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.errors import ConfigError
from moka_pl.ops.thin import is_thin
from moka_pl.training.checkpoint import find_last


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


def test_longer_run_stretches_the_schedule(train, tmp_path):
    train(saving(tmp_path), max_epochs=1)
    whole = train(max_epochs=3)
    resumed = train(ckpt_path=tmp_path / "4.ckpt", max_epochs=3)
    assert resumed.rates == {k: v for k, v in whole.rates.items() if k > 4}
    assert len(resumed.rates) == 8


def test_schedule_needs_an_end(make_module, make_data, make_trainer):
    with pytest.raises(ConfigError, match="needs the length of the run"):
        make_trainer(max_epochs=-1, limit_val_batches=0).fit(make_module(), make_data())


# --ckpt_path last


def logger(folder, name="demo"):
    return SimpleNamespace(init_args=SimpleNamespace(save_dir=str(folder), name=name, version=None))


def run_folder(folder: Path, version: str, finished: bool = True) -> Path:
    checkpoints = folder / "demo" / version / "checkpoints"
    checkpoints.mkdir(parents=True)
    if finished:
        (checkpoints / "last.ckpt").touch()
    return checkpoints / "last.ckpt"


def test_newest_run_with_a_checkpoint(tmp_path):
    run_folder(tmp_path, "version_9")
    newest = run_folder(tmp_path, "version_10")  # newer than 9, though it sorts before it
    run_folder(tmp_path, "version_11", finished=False)
    run_folder(tmp_path, "version_x")
    assert find_last(logger(tmp_path)) == (newest, 10)


def test_home_folders_are_found_and_unknown_ones_are_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    newest = run_folder(tmp_path, "version_1")
    assert find_last(logger("~")) == (newest, 1)
    assert find_last(False, "~/" + str(newest.parent.relative_to(tmp_path)))[0] == newest
    with pytest.raises(ConfigError, match=r"~no_such_user/x \(checkpoint.dirpath\) has no last.ckpt"):
        find_last(False, "~no_such_user/x")


@pytest.mark.parametrize(("kept", "version"), [({"moka_log_version": 3}, 3), ({}, None)])
def test_checkpoints_in_a_folder_of_the_users(tmp_path, kept, version):
    run_folder(tmp_path, "version_9")
    path = tmp_path / "mine" / "last.ckpt"
    with pytest.raises(ConfigError, match=r"mine \(checkpoint.dirpath\) has no last.ckpt"):
        find_last(logger(tmp_path), str(path.parent))
    path.parent.mkdir()
    torch.save({"callbacks": {"Other": [], "RunCheckpoint{}": {"dirpath": "mine"} | kept}}, path)
    assert find_last(logger(tmp_path), str(path.parent)) == (path, version)
    assert find_last(False, str(path.parent)) == (path, None)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ConfigError, match="is damaged or not a checkpoint"):
        find_last(logger(tmp_path), str(path.parent))


def test_no_run_yet(tmp_path):
    with pytest.raises(ConfigError, match=r"no run below .*demo has a checkpoints/last.ckpt"):
        find_last(logger(tmp_path))


@pytest.mark.parametrize(
    "value", [None, True, False, SimpleNamespace(init_args=SimpleNamespace(save_dir="x"))]
)
def test_logger_without_versions(value):
    with pytest.raises(ConfigError, match="give the path of the checkpoint instead"):
        find_last(value)


def test_a_logger_whose_versions_are_no_folders(tmp_path):
    """W&B's are the ids of its runs; those of another logger in the same folder are none of its."""
    run_folder(tmp_path, "version_3")
    for name, found in (("WandbLogger", False), ("CSVLogger", True), ("TensorBoardLogger", True)):
        given = logger(tmp_path)
        given.class_path = f"lightning.pytorch.loggers.{name}"
        if found:
            assert find_last(given)[1] == 3
            continue
        with pytest.raises(ConfigError, match=rf"\(the first\) is {given.class_path}; give the path"):
            find_last(given)
