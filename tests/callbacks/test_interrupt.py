import os
import signal
import threading
from multiprocessing import active_children
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from moka_pl.callbacks import AdapterCheckpoint, GracefulInterrupt, RunCheckpoint, interrupt
from moka_pl.callbacks.interrupt import _leave_terminal
from moka_pl.data.batching.loader import ResumableDataLoader
from moka_pl.errors import DataError
from moka_pl.training.trainer_state import between_steps
from moka_pl.utils import ended_by_signals


@pytest.fixture(autouse=True)
def _heeded_hangup():
    """Under ``nohup`` SIGHUP is ignored, and a run leaves it so; these tests are of one that heeds it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


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
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.fixture(scope="module")
def made():
    return []


@pytest.fixture
def whole(train, made):
    """The run that nothing stopped, the same for all tests."""
    if not made:
        made.append(train())
    return made[0]


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
    train, whole, assert_continues, tmp_path, capsys, caplog, hook, times, number, stopped
):
    with pytest.raises(SystemExit) as end, caplog.at_level("INFO"):
        train(Kill(hook, times, number), AdapterCheckpoint(), GracefulInterrupt())
    assert end.value.code == 1
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert "Stopping after this step" in capsys.readouterr().out
    said = f"Interrupted after step {stopped}; checkpoint saved in {path}. To resume, add --ckpt_path last to"
    assert said in caplog.text
    assert "weights_only" not in caplog.text
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == stopped
    # What the validation has shown is in it, so that a worse adapter cannot take the place of the best.
    best = saved["callbacks"]["AdapterCheckpoint"]["best_score"]
    assert best == (pytest.approx(whole.validations[4]) if stopped >= 4 else None)

    resumed = train(AdapterCheckpoint(), ckpt_path=path)
    assert_continues(resumed, whole, stopped)
    # Of the uninterrupted run's validations, those before the stop are done, and only those.
    assert resumed.validations == {k: v for k, v in whole.validations.items() if k > stopped}


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 8}])
@pytest.mark.parametrize(
    ("hook", "times", "number"),
    [
        ("on_before_backward", 14, signal.SIGINT),  # in the last step
        ("on_train_batch_end", 14, signal.SIGTERM),
        ("on_validation_batch_start", 4, signal.SIGINT),  # in the validation after it
        ("on_train_epoch_end", 2, signal.SIGINT),
    ],
)
def test_asked_in_the_last_step_it_ends_as_usual(
    train, whole, tmp_path, capsys, caplog, hook, times, number, limit
):
    saved = AdapterCheckpoint()
    with caplog.at_level("INFO"):
        run = train(Kill(hook, times, number), saved, GracefulInterrupt(), **limit)
    assert run.losses == whole.losses
    assert run.validations == whole.validations
    assert "The last step: the run ends as usual" in capsys.readouterr().out
    assert f"Training was complete after step 8; its adapter is {saved.last_path}" in caplog.text
    assert "To resume" not in caplog.text
    assert not (tmp_path / "checkpoints").exists()
    assert (tmp_path / "adapters" / "best").is_dir()


def test_in_the_last_step_a_second_ctrl_c_stops_at_once(train, tmp_path, caplog):
    with pytest.raises(SystemExit), caplog.at_level("INFO"):
        train(Kill("on_validation_batch_start", 4, repeat=2), AdapterCheckpoint(), GracefulInterrupt())
    assert f"Adapter of step 8 saved in {tmp_path / 'adapters' / 'last'}" in caplog.text
    assert "To resume" not in caplog.text


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


# Other signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_repeated_signals_of_schedulers_and_terminals_are_one(train, tmp_path, number):
    with pytest.raises(SystemExit):
        train(Kill("on_train_batch_start", 3, number, repeat=3), GracefulInterrupt())
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_that_others_handle_is_theirs(train, number):
    seen = []
    before = signal.signal(number, lambda *args: seen.append(number))  # such as nohup
    try:
        run = train(Kill("on_train_batch_end", 2, number), GracefulInterrupt(), max_epochs=1)
    finally:
        signal.signal(number, before)
    assert run.trainer.state.finished
    assert seen == [number]


@pytest.mark.parametrize(("device", "stops_at"), [("cpu", 10), ("cuda", 11)])
def test_ranks_agree_every_ten_steps_and_those_of_gpus_a_step_later(monkeypatch, device, stops_at):
    flags = []

    class Question:
        def __init__(self, flag, device):
            flags.append(flag)

        def answer(self):
            return flags[-1]

    monkeypatch.setattr(interrupt, "AnyRank", Question)
    callback = GracefulInterrupt()
    callback.asked = True
    trainers = [SimpleNamespace(world_size=2, global_step=step) for step in (9, 10, 11)]
    stops = [t.global_step for t in trainers if callback._any_asked(t, torch.device(device))]
    assert stops == [stops_at]
    assert flags == [True]


def test_signals_end_a_run_at_once_before_there_is_something_to_save():
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        with pytest.raises(KeyboardInterrupt), ended_by_signals():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_DFL


def test_prints_nowhere_once_the_terminal_is_gone(monkeypatch):
    ours, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        _leave_terminal()
        assert os.isatty(terminal)
        os.close(ours)
        _leave_terminal()
        print("x" * 10_000, flush=True)


# Loaders


class Breaking(Dataset):
    """The training data of another dataset; after some rows something happens."""

    def __init__(self, rows, after, act):
        self.rows, self.left, self.act = rows, after, act

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            self.act()
        return self.rows[index]


@pytest.fixture
def breaking(monkeypatch):
    """Has something happen in the loader of the training data, once so many batches are loaded."""

    def arrange(after, act):
        def loader(dataset, **options):
            return ResumableDataLoader(Breaking(dataset, after, act), **options)

        monkeypatch.setattr("moka_pl.data.base.ResumableDataLoader", loader)

    return arrange


def fail():
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("after", [4, 5, 11])
def test_saves_a_run_whose_loader_fails(train, whole, assert_continues, tmp_path, breaking, after):
    breaking(after, fail)
    with pytest.raises(OSError, match="Input/output error"):
        train(AdapterCheckpoint(), GracefulInterrupt())
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert (tmp_path / "adapters" / "last" / "adapter_model.safetensors").is_file()
    stopped = {4: 2, 5: 2, 11: 6}[after]  # 5 is in the middle of an accumulated batch
    assert torch.load(path, weights_only=True)["global_step"] == stopped
    breaking(10**9, fail)
    assert_continues(train(ckpt_path=path), whole, stopped)


def test_a_loader_that_is_stuck_does_not_keep_a_run_from_stopping(train, tmp_path, breaking, monkeypatch):
    def hang():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([signal.SIGUSR2], 20)  # until interrupted
        threading.Event().wait(20)

    monkeypatch.setattr(interrupt, "_STUCK_AFTER", 0.1)
    breaking(4, hang)
    with pytest.raises(SystemExit):
        train(AdapterCheckpoint(), GracefulInterrupt())
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_workers_of_a_loader_do_not_act_on_signals(make_module, make_data, make_trainer, number, capfd):
    class KillWorkers(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:
                for child in active_children():
                    os.kill(child.pid, number)

    trainer = make_trainer(KillWorkers(), GracefulInterrupt())
    trainer.fit(make_module(), make_data(num_workers=2))
    assert trainer.state.finished
    assert "Stopping" not in capfd.readouterr().out


@pytest.mark.slow
def test_a_killed_worker_is_one_line_and_the_run_is_saved(make_module, make_data, make_trainer, tmp_path):
    class KillWorkers(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            if trainer.global_step == 2:
                for child in active_children():
                    os.kill(child.pid, signal.SIGKILL)

    trainer = make_trainer(KillWorkers(), AdapterCheckpoint(), GracefulInterrupt(), max_epochs=20)
    with pytest.raises(DataError, match=r"^a worker that loads data was killed .*num_workers") as error:
        trainer.fit(make_module(), make_data(num_workers=2))
    assert "\n" not in str(error.value)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] >= 3
    assert (tmp_path / "adapters" / "last").is_dir()
