import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from moka_pl.callbacks import AdapterCheckpoint, RunCheckpoint
from moka_pl.errors import MokaWarning
from moka_pl.training.schedule import WarmupDecay
from moka_pl.training.trainer_state import between_steps
from moka_pl.training.writing.whole_files import finish_writing

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using", "error:.*not empty", "error:checkpoint.dirpath"
)
ON = {"max_epochs": 2}
STEPS = {"max_epochs": -1, "max_steps": 8}


@pytest.fixture
def constant_rate(monkeypatch):
    """A longer run's rates are then a shorter one's, and so are its losses."""
    original = WarmupDecay.__init__
    monkeypatch.setattr(
        WarmupDecay, "__init__", lambda self, o: original(self, o, warmup=0, decay="constant")
    )


def saving(folder, **options):
    return RunCheckpoint(folder, save_last=True, enable_version_counter=False, **options)


def load(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


class Stop(Callback):
    """Asks for the end of the run in a batch, as a limit on its time does."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.batch:
            trainer.should_stop = True


# An epoch has 7 batches and 4 steps: of two batches each, the last of one.
@pytest.mark.parametrize(
    ("checkpoint", "ending", "common", "longer", "end"),
    [
        ({"every_n_train_steps": 3}, {"max_epochs": 1}, {}, ON, 4),
        ({"every_n_train_steps": 4}, {"max_epochs": 1}, {}, ON, 4),  # saved before the validation
        ({"every_n_train_steps": 3}, {"max_epochs": 1}, {"limit_val_batches": 0}, ON, 4),
        ({}, {"max_epochs": 1}, {"val_check_interval": 4}, ON, 4),  # the last validation is at step 2
        ({}, {"max_epochs": 1}, {"val_check_interval": 3, "limit_train_batches": 6}, ON, 3),
        # The end is in the middle of an epoch:
        ({}, {"max_steps": 3, "max_epochs": -1}, {}, STEPS, 3),
        ({"every_n_train_steps": 2}, {"max_steps": 3, "max_epochs": -1}, {}, STEPS, 3),
        ({}, {"max_steps": 2, "max_epochs": -1}, {"val_check_interval": 4}, STEPS, 2),
        ({"every_n_train_steps": 3}, {"stop": 4}, {}, ON, 2),
        ({"every_n_train_steps": 3}, {"stop": 3}, {}, ON, 2),  # asked for within a step
        pytest.param({}, {"stop": 1}, {"limit_val_batches": 0}, ON, 1, marks=pytest.mark.slow),
        pytest.param({}, {"stop": 7}, {}, ON, 4, marks=pytest.mark.slow),
        pytest.param({}, {"stop": 5, "min_steps": 4}, {}, ON, 4, marks=pytest.mark.slow),  # not before that
    ],
    ids=str,
)
def test_finished_run_goes_on_from_its_end(
    train, assert_continues, constant_rate, tmp_path, checkpoint, ending, common, longer, end
):
    options = dict(ending)
    stop = [Stop(options.pop("stop"))] if "stop" in options else []
    ended = train(AdapterCheckpoint(), *stop, saving(tmp_path, **checkpoint), **(common | options))
    assert ended.trainer.global_step == end
    saved = load(tmp_path)
    assert saved["global_step"] == end
    # A validation after the last step is in it, so that a worse adapter cannot take the place of the best.
    best = min(ended.validations.values(), default=None)
    assert saved["callbacks"]["AdapterCheckpoint"]["best_score"] == (best and pytest.approx(best))

    whole = train(**(common | longer))
    resumed = train(saving(tmp_path, **checkpoint), ckpt_path=tmp_path / "last.ckpt", **(common | longer))
    assert len(whole.losses) > end
    assert_continues(resumed, whole, end)
    assert resumed.validations == {k: v for k, v in whole.validations.items() if k > end}
    assert load(tmp_path)["global_step"] == len(whole.losses)


def test_a_stop_of_a_fit_that_fails_within_its_step_is_no_wish_of_the_next(train, tmp_path):
    class Fail(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                raise LookupError

    saver = saving(tmp_path)
    with pytest.raises(LookupError):
        train(Stop(1), Fail(), saver, max_epochs=1)
    assert train(saver, max_epochs=1).trainer.global_step == 4


def test_a_run_stopped_early_by_a_validation_within_a_step_goes_on(train, assert_continues, tmp_path):
    options = {"val_check_interval": 3, "max_epochs": 2}  # of steps of two batches
    stop = EarlyStopping("val/loss", stopping_threshold=1e9)
    ended = train(stop, AdapterCheckpoint(), saving(tmp_path), **options)
    assert load(tmp_path)["global_step"] == ended.trainer.global_step == 2
    assert stop.stopped_epoch == 0
    whole = train(**options)
    resumed = train(saving(tmp_path), ckpt_path=tmp_path / "last.ckpt", **options)
    assert_continues(resumed, whole, 2)


def test_checkpoints_of_validations_within_a_step_are_resumed(train, assert_continues, tmp_path):
    options = {"val_check_interval": 3}
    each = {"save_top_k": -1, "filename": "{step}", "auto_insert_metric_name": False}
    look = Look(tmp_path)
    whole = train(look, saving(tmp_path, monitor="val/loss", **each), **options)
    assert list(whole.validations) == [1, 3, 5, 7]
    assert all(look.between)
    files = sorted(tmp_path.glob("?.ckpt"))
    assert [file.stem for file in files] == ["2", "3", "6", "7"]
    for file in files:
        resumed = train(ckpt_path=file, **options)
        assert_continues(resumed, whole, int(file.stem))
        later = {k: v for k, v in whole.validations.items() if k >= int(file.stem)}
        assert resumed.validations.items() <= later.items()


class Look(Callback):
    """Keeps the step of last.ckpt after every batch, and whether each was written between two steps."""

    def __init__(self, folder):
        self.file = folder / "last.ckpt"
        self.steps, self.between = [], []

    def on_train_batch_start(self, trainer, *args):
        finish_writing(trainer)
        if self.file.exists():
            self.steps.append(load(self.file.parent)["global_step"])

    def on_save_checkpoint(self, trainer, *args):
        self.between.append(between_steps(trainer))


def test_last_is_refreshed_in_a_long_epoch(train, tmp_path):
    look = Look(tmp_path)
    train(look, saving(tmp_path, every_n_train_steps=1), max_epochs=1)
    assert look.steps == [1, 1, 2, 2, 3]
    assert all(look.between)


def test_resumed_run_saves_nothing_within_a_step(train, tmp_path):
    train(saving(tmp_path, every_n_train_steps=2), max_steps=2, max_epochs=-1)
    look = Look(tmp_path)
    options = {"max_epochs": 1, "ckpt_path": tmp_path / "last.ckpt"}
    train(look, saving(tmp_path, every_n_train_steps=2), **options)
    assert look.between
    assert all(look.between)


def test_trial_and_evaluation_leave_no_files(make_module, make_data, make_trainer, tmp_path):
    options = {"enable_checkpointing": True}
    make_trainer(saving(tmp_path / "no"), fast_dev_run=2, **options).fit(make_module(), make_data())
    make_trainer(saving(tmp_path / "no"), **options).validate(make_module(), make_data(), verbose=False)
    assert not (tmp_path / "no").exists()


def test_save_last_can_be_switched_off(train, tmp_path):
    train(RunCheckpoint(tmp_path), max_epochs=1)
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["epoch=0-step=4.ckpt"]


def test_the_best_checkpoints_are_those_that_are_there_and_of_the_same_data(tmp_path):
    kept = tmp_path / "kept.ckpt"
    kept.touch()

    def load(best, validation="data 1.0", monitor="val/loss", here="data 1.0"):
        callback = saving(tmp_path, monitor=monitor)
        callback._validation = here
        empty = callback.state_dict() | {"validation": validation}
        score = torch.tensor(1.0)
        told = {"best_model_score": score, "best_k_models": {best: score}, "best_model_path": best}
        callback.load_state_dict(empty | told)
        return callback

    found = load(str(kept))
    assert (found.best_model_path, set(found.best_k_models)) == (str(kept), {str(kept)})
    gone = load(str(tmp_path / "gone.ckpt"))
    assert (gone.best_model_path, gone.best_model_score, gone.best_k_models) == ("", None, {})
    assert load(str(kept), validation="other 1.0").best_k_models == {}
    assert set(load(str(kept), here=None).best_k_models) == {
        str(kept)
    }  # an evaluation, which chooses nothing


def test_another_runs_folder_is_told(train, tmp_path):
    train(saving(tmp_path / "mine"), max_epochs=1)
    told = r"checkpoint.dirpath .*mine holds another run's epoch=0-step=4.ckpt, last.ckpt: files of the same"
    with pytest.warns(MokaWarning, match=told):
        train(saving(tmp_path / "mine"), max_epochs=1)
    train(saving(tmp_path / "mine"), max_epochs=2, ckpt_path=tmp_path / "mine" / "last.ckpt")  # its own
