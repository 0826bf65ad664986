"""Values that arrive late are logged all the same, under their own steps."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moka_pl.callbacks import BatchStatistics, GateMonitor, Throughput, gates
from moka_pl.training import steps
from moka_pl.training.launches import HostCopy

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
