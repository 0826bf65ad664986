import math

import pytest
import torch

from moka_pl.metrics import EvalMetrics

INF = math.inf
pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric SumMetric was called before")


def choices(item, task, answer):
    """A batch of options: item number, task and whether it is the answer, of every option."""
    return {
        "item": torch.tensor(item),
        "task": torch.tensor(task),
        "is_answer": torch.tensor(answer, dtype=torch.bool),
    }


def test_loss_is_the_mean_over_tokens_not_over_batches():
    metrics = EvalMetrics([("plain", [])])
    metrics.update_loss(0, torch.tensor(6.0), torch.tensor(2.0))
    metrics.update_loss(0, torch.tensor(1.0), torch.tensor(8.0))
    assert metrics.compute() == {"loss": pytest.approx(0.7)}


def test_small_sums_are_not_lost_in_large_ones():
    metrics = EvalMetrics([("plain", [])])
    metrics.update_loss(0, torch.tensor(2.0**26), torch.tensor(1.0))
    for _ in range(100):
        metrics.update_loss(0, torch.tensor(0.25), torch.tensor(0.0))
    assert metrics.compute()["loss"] == 2.0**26 + 25


def test_accuracy_by_hand():
    # Task 0: item 0 right, item 1 wrong, item 2 a tie of the answer with another option (wrong), item 3
    # right although two of its wrong options tie. Task 1: item 4 right. Item 5 is a filler.
    item = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5]
    task = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, -1, -1]
    answer = [1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0]
    logs = [-1.0, -2, -3, -4, -5, -2, -2, -7, -7, -6.5, -9, -8, 0, 0]
    metrics = EvalMetrics([("commonsense", ["arc", "boolq", "unseen"])])
    metrics.update_choices(0, torch.tensor(logs), choices(item, task, answer))
    assert metrics.compute() == {
        "accuracy/arc": 0.5,
        "accuracy/boolq": 1.0,
        "accuracy": 0.75,  # of tasks, not of items (3 / 5); a task without items does not count
    }
    # Another batch with other item numbers: 1 of 2 wrong.
    metrics.update_choices(0, torch.tensor([-2.0, -1, -3, -1]), choices([0, 0, 1, 1], [1] * 4, [1, 0, 0, 1]))
    values = metrics.compute()
    assert values["accuracy/boolq"] == pytest.approx(2 / 3)
    assert values["accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_several_sets_count_alike():
    metrics = EvalMetrics([("choice", ["a", "b"]), ("plain", []), ("empty", ["c"])])
    metrics.update_loss(0, torch.tensor(4.0), torch.tensor(1.0))
    metrics.update_loss(1, torch.tensor(2000.0), torch.tensor(1000.0))
    metrics.update_choices(
        0, torch.tensor([-1.0, -2, -1, -2]), choices([0, 0, 1, 1], [0, 0, 1, 1], [1, 0, 0, 1])
    )
    assert metrics.compute() == {
        "loss": 3.0,
        "choice/loss": 4.0,
        "plain/loss": 2.0,
        "accuracy": 0.5,
        "choice/accuracy": 0.5,
        "accuracy/a": 1.0,
        "accuracy/b": 0.0,
    }


def test_one_task_in_two_sets_is_the_same_task():
    metrics = EvalMetrics([("first", ["arc"]), ("second", ["arc"])])
    metrics.update_choices(0, torch.tensor([-1.0, -2]), choices([0, 0], [0, 0], [1, 0]))
    metrics.update_choices(1, torch.tensor([-2.0, -1, -2, -1]), choices([0, 0, 1, 1], [0] * 4, [1, 0, 1, 0]))
    values = metrics.compute()
    assert (values["first/accuracy"], values["second/accuracy"]) == (1.0, 0.0)
    assert values["accuracy/arc"] == pytest.approx(1 / 3)


def test_nothing_seen():
    metrics = EvalMetrics([("choice", ["a"]), ("plain", [])])
    assert metrics.compute() == {}
    metrics.update_choices(0, torch.tensor([0.0, 0.0]), choices([0, 0], [-1, -1], [0, 0]))
    metrics.update_loss(1, torch.tensor(0.0), torch.tensor(0.0))
    assert metrics.compute() == {}


def test_reset():
    metrics = EvalMetrics([("plain", ["a"])])
    metrics.update_loss(0, torch.tensor(6.0), torch.tensor(2.0))
    metrics.update_choices(0, torch.tensor([-1.0, -2]), choices([0, 0], [0, 0], [1, 0]))
    assert metrics.compute() == {"loss": 3.0, "accuracy": 1.0, "accuracy/a": 1.0}
    metrics.reset()
    metrics.update_loss(0, torch.tensor(1.0), torch.tensor(4.0))
    assert metrics.compute() == {"loss": 0.25}


def test_nan_shows():
    metrics = EvalMetrics([("plain", []), ("other", [])])
    metrics.update_loss(0, torch.tensor(math.nan), torch.tensor(3.0))
    metrics.update_loss(0, torch.tensor(1.0), torch.tensor(1.0))
    metrics.update_loss(1, torch.tensor(1.0), torch.tensor(1.0))
    values = metrics.compute()
    assert math.isnan(values["plain/loss"])
    assert math.isnan(values["loss"])
    assert values["other/loss"] == 1.0


@pytest.mark.parametrize("logs", [[math.nan, -1.0], [-1.0, math.nan], [math.nan, math.nan], [-INF, -INF]])
def test_undefined_likelihoods_are_wrong_answers(logs):
    metrics = EvalMetrics([("choice", ["a"])])
    metrics.update_choices(0, torch.tensor(logs), choices([0, 0], [0, 0], [1, 0]))
    assert metrics.compute()["accuracy/a"] == 0.0
