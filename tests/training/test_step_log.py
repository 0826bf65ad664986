"""Values that arrive late are logged all the same, under their own steps."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moka_pl.callbacks import BatchStatistics, GateMonitor, Throughput, gates
from moka_pl.training import steps
from moka_pl.training.launches import HostCopy, KeptObjects
from moka_pl.training.step_log import StepLog

TAGS = ("train/loss", "train/grad_norm", "train/lr")


class Late(HostCopy):
    """A copy from a GPU that is as late as can be."""

    arrived = False


class Look(Callback):
    """Looks at what is logged when a step begins, and may end the run there."""

    def __init__(self, fails_at: int | None = None, error: type[BaseException] = RuntimeError) -> None:
        self.fails_at, self.error = fails_at, error
        self.losses: list[float] = []
        self.bar: list[float | None] = []

    def on_train_batch_end(self, trainer, pl_module, *of_batch) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.bar.append(trainer.progress_bar_metrics.get("loss"))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == self.fails_at:
            raise self.error


@pytest.fixture
def arrive_late(monkeypatch):
    """Has what is logged arrive as late as can be from here on."""

    def start() -> None:
        for module in (steps, gates):
            monkeypatch.setattr(module, "HostCopy", Late)

    return start


@pytest.fixture
def fit(make_module, make_data, make_trainer, tmp_path):
    """Trains, and returns the values by tag and step."""

    def run(*callbacks: Callback, every: int = 1, **options) -> dict[str, dict[int, float]]:
        logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
        trainer = make_trainer(*callbacks, logger=logger, log_every_n_steps=every, **options)
        torch.manual_seed(0)
        try:
            trainer.fit(make_module(), make_data())
        except (RuntimeError, SystemExit):
            assert any(isinstance(callback, Look) and callback.fails_at for callback in callbacks)
        found = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0}).Reload()
        tags = [tag for tag in found.Tags()["scalars"] if tag in TAGS or tag.startswith("α")]
        return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in tags}

    return run


@pytest.mark.parametrize("every", [1, 3])
def test_the_same_values_at_the_same_steps(fit, arrive_late, every) -> None:
    at_once = fit(GateMonitor(), every=every)
    arrive_late()
    look = Look()
    late = fit(look, GateMonitor(), every=every)
    assert late == at_once
    assert list(late["train/loss"]) == list(range(every - 1, 7, every))
    assert [late["train/loss"][step] for step in range(every - 1, 7, every)] == look.losses[
        every - 1 :: every
    ]
    assert look.bar == [None, *look.losses[:-1]]  # of the step before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_lost_when_a_run_ends_early(fit, arrive_late, error) -> None:
    arrive_late()
    found = fit(GateMonitor(), Look(4, error))
    assert all(list(found[tag]) == [0, 1, 2, 3] for tag in TAGS)
    assert list(found["α/entropy"]) == [0, 1, 2, 3, 4]


def test_a_step_is_logged_before_its_checkpoint_is_written(fit, arrive_late, monkeypatch, tmp_path) -> None:
    arrive_late()
    logged = []

    class Save(Callback):
        def on_train_batch_end(self, trainer, *of_batch) -> None:
            if trainer.global_step == 3:
                monkeypatch.setattr(trainer.logger, "log_metrics", lambda metrics, step: logged.append(step))
                trainer.save_checkpoint(tmp_path / "step.ckpt")
                logged.append("saved")

    fit(Save())
    assert logged[:2] == [2, "saved"]


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_fails_before_its_update_is_not_logged(fit, arrive_late, late) -> None:
    """A resumed run takes it again."""
    if late:
        arrive_late()

    class Fail(Look):
        def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
            if trainer.global_step == 4:
                pl_module.configure_gradient_clipping = self.fail

        def fail(self, *of_step, **clipping) -> None:
            raise RuntimeError

    found = fit(Fail(99))
    assert all(list(found[tag]) == [0, 1, 2, 3] for tag in TAGS)


def test_a_checkpoint_within_a_step_does_not_wait_for_it(fit, arrive_late, monkeypatch, tmp_path) -> None:
    """The first of several ranks saves the last step while the GPU waits for a rank that has failed."""
    arrive_late()
    read: list[int] = []

    class Save(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
            if trainer.global_step == 2:
                pl_module.configure_gradient_clipping = self.save
                self.trainer = trainer

        def save(self, *of_step, **clipping) -> None:
            if self.trainer.global_step == 2:
                with monkeypatch.context() as patch:
                    patch.setattr(Late, "read", lambda copy: read.append(2))
                    self.trainer.save_checkpoint(tmp_path / "step.ckpt")

    found = fit(Save())
    assert (tmp_path / "step.ckpt").exists()
    assert read == []
    assert list(found["train/loss"]) == list(range(len(found["train/loss"])))


def test_a_trainer_gets_the_log_once(make_module, make_data, make_trainer, caplog) -> None:
    """Lightning tells of callbacks that it replaces, at each of a trainer's commands."""
    module, data, trainer = make_module(), make_data(), make_trainer()
    with caplog.at_level("INFO"):
        trainer.fit(module, data)
        trainer.validate(module, data)
    assert "will override" not in caplog.text
    assert sum(isinstance(callback, StepLog) for callback in trainer.callbacks) == 1
    assert sum(isinstance(callback, KeptObjects) for callback in trainer.callbacks) == 1
    other = make_module()
    trainer.validate(other, data)
    (log,) = [callback for callback in trainer.callbacks if isinstance(callback, StepLog)]
    assert log is other._step_log


def test_logged_metrics_of_the_trainer_hold_the_step(fit) -> None:
    held = []

    class Hold(Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            held.append(trainer.logged_metrics)

    found = fit(Hold())
    for tag in TAGS:
        assert held[0][tag] == pytest.approx(list(found[tag].values())[-1])


def test_nothing_that_lightning_reads_is_computed_by_the_model(make_module, make_data, make_trainer) -> None:
    """Whatever it reads for the bar and the loggers at the end of a step, a GPU would be waited for."""
    names: set[str] = set()

    class Read(Callback):
        def on_train_batch_end(self, trainer, pl_module, *of_batch) -> None:
            read = [one for one in trainer._results.values() if one.meta.logger or one.meta.prog_bar]
            names.update(one.meta.name for one in read)

    make_trainer(Read(), Throughput(), BatchStatistics()).fit(make_module(), make_data())
    measured = {"tok/s", "train/tokens_per_second", "train/peak_memory_gib", "train/padding_share"}
    assert names == {"loss"} | measured
