import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from moka_pl.adapters import (
    BaseModel,
    MokaConfig,
    adapter_state,
    inject_adapter,
    read_adapter,
    save_adapter,
)
from moka_pl.adapters.reading import read_adapter_state
from moka_pl.callbacks import AdapterCheckpoint, RunCheckpoint
from moka_pl.data import InstructionData


class Fake(Callback):
    """Replaces a metric by a list of values, one a validation, before the checkpoint looks at it."""

    def __init__(self, name, values):
        self.name, self.values, self.states = name, list(values), []

    def on_validation_end(self, trainer, pl_module):
        trainer.callback_metrics[self.name] = torch.tensor(self.values[len(self.states)])
        self.states.append({k: v.clone() for k, v in adapter_state(pl_module.causal_lm).items()})


def same(path, state):
    stored = read_adapter_state(path)
    return stored.keys() == state.keys() and all(torch.equal(stored[k], v) for k, v in state.items())


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("min", [3.0, 1.0, 2.0], 1),
        ("max", [3.0, 1.0, 2.0], 0),
        ("max", [0.25, 0.5, 0.5], 1),  # the first of equals
        ("min", [float("nan"), 5.0, float("nan")], 1),
        ("min", [-1.0, 0.0, float("-inf")], 0),
    ],
)
def test_best_and_last(train, tmp_path, mode, values, best):
    fake = Fake("val/thing", values)
    saved = AdapterCheckpoint(monitor="val/thing", mode=mode)
    train(fake, saved, max_epochs=3)
    assert saved.best_score == values[best]
    assert saved.best_path == tmp_path / "adapters" / "best"
    assert same(saved.best_path, fake.states[best])
    assert same(saved.last_path, fake.states[2])
    assert read_adapter(saved.best_path).extra["step"] == 4 * (best + 1)
    assert read_adapter(saved.last_path).extra["step"] == 12
    assert not same(saved.best_path, fake.states[2])


def test_names_all_files_of_a_list(make_module, make_trainer, tmp_path):
    files = [tmp_path / name for name in ("some.jsonl", "more.jsonl")]
    for file in files:
        rows = [{"instruction": f"{file.name} {number}", "output": "yes"} for number in range(8)]
        file.write_text("\n".join(map(json.dumps, rows)))
    saved = AdapterCheckpoint(dirpath=str(tmp_path / "kept"))
    data = InstructionData([str(file) for file in files], prompt="alpaca", batch_size=8)
    make_trainer(saved, max_epochs=1).fit(make_module(), data)
    assert read_adapter(saved.last_path).extra["data"] == "InstructionData: some.jsonl, more.jsonl"


def test_loaded_adapter_gives_exactly_the_same_metrics(
    make_module, make_data, make_trainer, randomize, tmp_path
):
    saved = AdapterCheckpoint(dirpath=str(tmp_path / "kept"))
    module = make_module(lr=3e-2, adapter={"scaling": 2.5, "filters": "prime"})
    trainer = make_trainer(saved, max_epochs=2)
    trainer.fit(module, make_data(eval_batch_size=2))
    extra = read_adapter(tmp_path / "kept" / "last").extra
    assert extra["metrics"] == module.eval_values
    assert extra["prompt"] == "alpaca"
    assert (extra["step"], extra["epoch"]) == (14, 2)

    fresh = make_module(adapter_path=str(tmp_path / "kept" / "last"))
    assert fresh.adapter == module.adapter  # of the adapter, not the default's three diverse components
    [values] = make_trainer().validate(fresh, make_data(eval_batch_size=2), verbose=False)
    assert fresh.eval_values == module.eval_values
    assert values["val/loss"] == trainer.callback_metrics["val/loss"].item()
    # The best adapter's metrics are its own, not those of the last.
    best = make_module(adapter_path=str(tmp_path / "kept" / "best"))
    make_trainer().validate(best, make_data(eval_batch_size=2), verbose=False)
    assert best.eval_values == read_adapter(tmp_path / "kept" / "best").extra["metrics"]
    assert saved.best_score == pytest.approx(best.eval_values["val/loss"])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory")
def test_best_survives_a_resumed_run(train, tmp_path):
    first = AdapterCheckpoint(monitor="val/thing")
    train(Fake("val/thing", [1.0]), first, ModelCheckpoint(tmp_path, filename="end"), max_epochs=1)
    kept = {k: v.clone() for k, v in read_adapter_state(first.best_path).items()}
    second, fake = AdapterCheckpoint(monitor="val/thing"), Fake("val/thing", [2.0, 0.5])
    train(fake, second, max_epochs=2, ckpt_path=tmp_path / "end.ckpt")
    assert (second.best_score, second.best_path) == (1.0, first.best_path)
    assert same(second.best_path, kept)
    assert same(second.last_path, fake.states[0])


def test_the_folder_may_be_below_the_home_folder(train, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    train(AdapterCheckpoint(dirpath="~/mine"), max_epochs=1, limit_val_batches=0)
    assert (tmp_path / "mine" / "last" / "adapter_config.json").is_file()


def test_without_validation(train, tmp_path):
    saved = AdapterCheckpoint()
    run = train(saved, max_epochs=1, limit_val_batches=0)
    assert (saved.best_score, saved.best_path) == (None, None)
    assert same(tmp_path / "adapters" / "last", run.state)
    assert not (tmp_path / "adapters" / "best").exists()


def test_steps_after_the_last_validation_are_in_last(train, tmp_path):
    saved = AdapterCheckpoint()
    run = train(saved, max_epochs=1, val_check_interval=4)
    best, last = (read_adapter(path).extra for path in (saved.best_path, saved.last_path))
    assert (best["step"], best["metrics_step"]) == (2, 2)
    assert (last["step"], last["metrics_step"]) == (4, 2)
    assert last["metrics"] == best["metrics"]
    said = "The metrics were measured after step 2; the weights are those of step 4."
    assert said in (saved.last_path / "README.md").read_text()
    assert "were measured after" not in (saved.best_path / "README.md").read_text()
    assert same(saved.last_path, run.state)


def test_trial_and_evaluation_leave_no_files(make_module, make_data, make_trainer, tmp_path):
    make_trainer(AdapterCheckpoint(), fast_dev_run=2).fit(make_module(), make_data())
    make_trainer(AdapterCheckpoint()).validate(make_module(), make_data(), verbose=False)
    assert not (tmp_path / "adapters").exists()


def test_frozen_base_is_no_candidate(make_module, make_data, make_trainer, tmp_path):
    saved = AdapterCheckpoint(monitor="val/loss", mode="max")
    # With this learning rate the base is better than whatever follows.
    make_trainer(saved, num_sanity_val_steps=-1).fit(make_module(lr=3e-2), make_data())
    described = json.loads((tmp_path / "adapters" / "best" / "adapter_config.json").read_text())
    assert described["extra"]["step"] == 7


@pytest.fixture
def make_stored(make_llama, randomize, tmp_path):
    """Saves an adapter of a step as the best of a run; returns the state of its callback."""

    def make(run, step, **state):
        model = make_llama()
        config = MokaConfig(components=2)
        inject_adapter(model, config)
        path = save_adapter(run / "adapters/best", model, config, BaseModel("x", None, "0"), {"step": step})
        told = {"monitor": "val/loss", "mode": "min", "best_step": step, "validation": "data 1.0"}
        return {"best_score": 1.0, "best_path": str(path)} | told | state

    return make


def resumed(checkpoint, folder, monitor="val/loss", mode="min"):
    """A callback set up as a run in a folder does that resumes from a checkpoint."""
    callback = AdapterCheckpoint(monitor, mode, dirpath=str(folder / "adapters"))
    callback._folder, callback._validation = folder / "adapters", "data 1.0"
    callback.on_load_checkpoint(SimpleNamespace(ckpt_path=str(checkpoint)), None, {})
    return callback


@pytest.mark.parametrize(
    ("state", "options", "reason"),
    [
        ({}, {"monitor": "val/accuracy"}, "chosen by monitor val/loss, now by val/accuracy"),
        ({}, {"mode": "max"}, "chosen by mode min, now by max"),
        ({"validation": "other 1.0"}, {}, "on other validation data"),
        ({"best_step": 5}, {}, "the best so far, is not there"),
    ],
)
def test_the_best_of_something_else_begins_anew(make_stored, tmp_path, caplog, state, options, reason):
    stored = make_stored(tmp_path / "run", 3, **state)
    callback = resumed(tmp_path / "run/checkpoints/last.ckpt", tmp_path / "run", **options)
    with caplog.at_level("INFO"):
        callback.load_state_dict(stored)
    assert (callback.best_score, callback.best_path) == (None, None)
    assert f"begins anew: the best so far was {reason}" in caplog.text or reason in caplog.text


def test_the_best_of_a_moved_run_is_found_beside_its_checkpoint_and_copied(make_stored, tmp_path):
    stored = make_stored(tmp_path / "old", 3)
    (tmp_path / "old").rename(tmp_path / "moved")
    make_stored(tmp_path / "old", 4)  # another run's, where the name leads
    callback = resumed(tmp_path / "moved/checkpoints/last.ckpt", tmp_path / "new")
    callback.load_state_dict(stored)
    assert callback.best_path == tmp_path / "moved/adapters/best"
    callback.on_train_start(SimpleNamespace(global_step=3, fast_dev_run=False, is_global_zero=True), None)
    assert callback.best_path == tmp_path / "new/adapters/best"
    assert read_adapter(callback.best_path).extra["step"] == 3
    assert callback.state_dict() == stored | {"best_path": str(callback.best_path)}


def test_a_state_of_before_has_the_path_alone(make_stored, tmp_path):
    stored = make_stored(tmp_path / "run", 3)
    callback = resumed("last.ckpt", tmp_path / "run")
    callback.load_state_dict({name: stored[name] for name in ("best_score", "best_path")})
    assert callback.best_path == tmp_path / "run/adapters/best"
    callback = resumed("last.ckpt", tmp_path / "run")
    callback.load_state_dict({"best_score": None, "best_path": None})
    assert callback.best_path is None


def test_a_folder_that_is_deleted_during_the_run_is_made_again(train, tmp_path):
    class Delete(Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 5:
                shutil.rmtree(trainer.log_dir, ignore_errors=True)

    logger = TensorBoardLogger(tmp_path / "logs")
    saving = RunCheckpoint(save_last=True)
    with pytest.warns(UserWarning, match="was deleted during the run; it is made again"):
        run = train(Delete(), AdapterCheckpoint(), saving, logger=logger, val_check_interval=2)
    folder = Path(run.trainer.log_dir)
    assert same(folder / "adapters" / "last", run.state)
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8
