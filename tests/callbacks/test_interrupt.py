import os
import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from moka_pl.callbacks import AdapterCheckpoint, GracefulInterrupt, RunCheckpoint
from moka_pl.callbacks.checkpoints import between_steps


class Kill(Callback):
    """Sends this process a signal at a moment of the run: a hook's name and how often it was called."""

    def __init__(self, hook, times, number=signal.SIGINT, repeat=1):
        self.left = times

        def call(trainer, *args, **kwargs):
            if trainer.sanity_checking:
                return
            self.left -= 1
            if self.left == 0:
                for _ in range(repeat):
                    os.kill(os.getpid(), number)

        setattr(self, hook, call)


@pytest.fixture(autouse=True)
def foreground():
    """As in a shell's foreground, also where the tests run in its background, which ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def same_handlers(foreground):
    """The test's process is left with the signal handlers it had."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize(
    ("hook", "times", "number", "stopped"),
    [
        ("on_train_batch_start", 3, signal.SIGINT, 2),  # before the first half of the second step's batch
        ("on_train_batch_end", 3, signal.SIGTERM, 2),  # between its halves
        ("on_before_backward", 5, signal.SIGINT, 3),
        ("on_train_batch_start", 7, signal.SIGINT, 4),  # a validation is due, and comes first
        ("on_validation_batch_start", 1, signal.SIGTERM, 4),
        ("on_train_epoch_end", 1, signal.SIGINT, 5),
    ],
)
def test_stops_at_the_next_step_and_goes_on_exactly(
    train, assert_continues, tmp_path, capsys, caplog, hook, times, number, stopped
):
    whole = train()
    with pytest.raises(SystemExit) as end, caplog.at_level("INFO"):
        train(Kill(hook, times, number), AdapterCheckpoint(), GracefulInterrupt())
    assert end.value.code == 1
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert "Stopping after this step" in capsys.readouterr().out
    said = f"Interrupted after step {stopped}; checkpoint saved in {path}. To resume, add --ckpt_path last to"
    assert said in caplog.text
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == stopped
    # What the validation has shown is in it, so that a worse adapter cannot take the place of the best.
    best = saved["callbacks"]["AdapterCheckpoint"]["best_score"]
    assert best == (pytest.approx(whole.validations[4]) if stopped >= 4 else None)

    resumed = train(AdapterCheckpoint(), ckpt_path=path)
    assert_continues(resumed, whole, stopped)
    # Of the uninterrupted run's validations, those before the stop are done, and only those.
    assert resumed.validations == {k: v for k, v in whole.validations.items() if k > stopped}


def test_validation_in_the_middle_of_an_accumulated_batch(train, assert_continues, tmp_path):
    options = {"val_check_interval": 3}
    whole = train(**options)
    with pytest.raises(SystemExit):
        train(Kill("on_validation_start", 1), GracefulInterrupt(), **options)
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 2  # the validation was after step 1
    assert_continues(train(ckpt_path=path, **options), whole, 2)


def test_second_signal_stops_at_once(train, tmp_path):
    with pytest.raises(SystemExit) as end:
        train(Kill("on_train_batch_end", 3, repeat=2), GracefulInterrupt())
    assert end.value.code == 1
    assert not (tmp_path / "checkpoints").exists()


def test_keeps_the_adapter(train, tmp_path):
    saved = AdapterCheckpoint()
    with pytest.raises(SystemExit):
        train(Kill("on_train_batch_end", 3), saved, GracefulInterrupt())
    assert (tmp_path / "adapters" / "last" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapters" / "best").exists()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_saves_into_the_folder_of_the_runs_checkpoints(train, tmp_path, caplog):
    ours = RunCheckpoint(dirpath=tmp_path / "mine", save_last=True, enable_version_counter=False)
    others = ModelCheckpoint(dirpath=tmp_path / "others", monitor="val/loss")
    with pytest.raises(SystemExit), caplog.at_level("INFO"):
        train(Kill("on_train_batch_end", 3), others, ours, GracefulInterrupt())
    path = tmp_path / "mine" / "last.ckpt"
    assert f"checkpoint saved in {path}. " in caplog.text
    assert torch.load(path, weights_only=True)["global_step"] == 2
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("repeat", [1, 2])
def test_trial_leaves_no_file(train, tmp_path, repeat):
    saving = RunCheckpoint(dirpath=tmp_path / "mine", save_last=True)
    with pytest.raises(SystemExit):
        train(
            Kill("on_train_batch_end", 3, repeat=repeat),
            AdapterCheckpoint(),
            saving,
            GracefulInterrupt(),
            fast_dev_run=4,
        )
    assert list(tmp_path.iterdir()) == []


def test_finished_run_gives_the_signals_back(train):
    run = train(GracefulInterrupt(), max_epochs=1)
    assert run.trainer.state.finished


def test_between_steps(train):
    class Look(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, *args):
            self.seen.append(between_steps(trainer))

    look = Look()
    train(look, max_epochs=1, accumulate_grad_batches=3)
    assert look.seen == [False, False, True, False, False, True, True]
