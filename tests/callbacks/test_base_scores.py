"""The validation before training, computed once for all runs of a base on the same data."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback

from moka_pl.backbone import BackboneConfig
from moka_pl.callbacks import BaseScores, RunSummary
from moka_pl.evaluation.module import EvaluatedModule
from moka_pl.training.module import MokaModule

OTHER_WEIGHTS = BackboneConfig("tiny", weights="random", seed=1)
OTHER_STORAGE = BackboneConfig("tiny", weights="random", quantization="none")


@pytest.fixture
def fit(
    make_module: Callable, make_data: Callable, make_trainer: Callable, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., SimpleNamespace]:
    """Trains one step; tells what was scored before it, the base's metrics and the loss."""
    score = EvaluatedModule._score

    def run(
        reuse: bool = True, data: dict | None = None, trainer: dict | None = None, **options: object
    ) -> SimpleNamespace:
        scored = []

        def counted(module: EvaluatedModule, batch: dict) -> object:
            scored.append(module.trainer.sanity_checking)
            return score(module, batch)

        monkeypatch.setattr(EvaluatedModule, "_score", counted)
        summary, losses = RunSummary(), Losses()
        module = make_module(**options)
        defaults = {"num_sanity_val_steps": -1, "max_steps": 1}
        made = make_trainer(BaseScores(reuse), summary, losses, **(defaults | (trainer or {})))
        made.fit(module, make_data(**(data or {})))
        return SimpleNamespace(
            before=sum(scored), after=len(scored) - sum(scored), metrics=summary.before, losses=losses.values
        )

    return run


class Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))


def test_a_second_run_takes_the_first_ones_scores_and_trains_alike(
    fit: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    first = fit()
    assert first.before == 3
    assert "taken from" not in caplog.text
    second = fit()
    assert caplog.text.count("validation before training: taken from ") == 1
    assert (second.before, second.after) == (0, first.after)
    assert second.metrics == first.metrics
    assert second.losses == first.losses


@pytest.mark.slow
def test_other_rates_take_them_too_and_they_can_be_left_out(fit: Callable) -> None:
    first = fit()
    other = fit(lr=1e-3)
    assert (other.before, other.metrics) == (0, first.metrics)
    assert fit(reuse=False).before == 3


@pytest.mark.parametrize(
    "change",
    [
        {"adapter": {"components": 2}},
        pytest.param({"trainer": {"precision": "bf16-mixed"}}, marks=pytest.mark.slow),
        pytest.param({"backbone": OTHER_WEIGHTS}, marks=pytest.mark.slow),
        pytest.param({"backbone": OTHER_STORAGE}, marks=pytest.mark.slow),
        pytest.param({"data": {"eval_batch_size": 3}}, marks=pytest.mark.slow),
        pytest.param({"data": {"prompt": "chat"}}, marks=pytest.mark.slow),
        pytest.param({"trainer": {"limit_val_batches": 2}}, marks=pytest.mark.slow),
    ],
)
def test_whatever_could_change_them_has_them_computed(fit: Callable, change: dict) -> None:
    fit()
    assert fit(**change).before > 0


def test_a_short_look_at_the_data_is_computed_and_not_kept(fit: Callable, kept_scores: Path) -> None:
    assert fit(trainer={"num_sanity_val_steps": 1}).before == 1
    assert not kept_scores.exists()


def test_a_class_of_the_users_own_may_compute_anything(
    fit: Callable, kept_scores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MokaModule, "__module__", "own")
    assert fit().before == 3
    assert not kept_scores.exists()


@pytest.mark.slow
def test_a_damaged_file_is_computed_again(fit: Callable, kept_scores: Path) -> None:
    first = fit()
    [file] = kept_scores.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.warns(match="is damaged"):
        again = fit()
    assert (again.before, again.metrics) == (3, first.metrics)
    assert fit().before == 0
