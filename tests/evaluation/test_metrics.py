import math

import pytest
import torch

from moka_pl.evaluation.metrics import EvalMetrics
from moka_pl.evaluation.results import Counts, macro

INF = math.inf


def choices(item, task, answer, chars=None):
    """A batch of options: item number, task and whether it is the answer, of every option."""
    return {
        "item": torch.tensor(item),
        "task": torch.tensor(task),
        "is_answer": torch.tensor(answer, dtype=torch.bool),
        "option_chars": torch.tensor(chars or [1] * len(item)),
    }


def computed(metrics):
    """The metrics that count right answers and tokens, without those by character and standard errors."""
    values = metrics.compute().values()
    return {k: v for k, v in values.items() if "acc_norm" not in k and not k.endswith("_stderr")}


def test_loss_is_the_mean_over_tokens_not_over_batches():
    metrics = EvalMetrics([("plain", [])])
    metrics.update_loss(0, torch.tensor(6.0), torch.tensor(2.0))
    metrics.update_loss(0, torch.tensor(1.0), torch.tensor(8.0))
    assert computed(metrics) == {"loss": pytest.approx(0.7)}


def test_small_sums_are_not_lost_in_large_ones():
    metrics = EvalMetrics([("plain", [])])
    metrics.update_loss(0, torch.tensor(2.0**26), torch.tensor(1.0))
    for _ in range(100):
        metrics.update_loss(0, torch.tensor(0.25), torch.tensor(0.0))
    assert computed(metrics)["loss"] == 2.0**26 + 25


def test_accuracy_by_hand():
    # Task 0: item 0 right, item 1 wrong, item 2 a tie of the answer with an earlier option (wrong), item 3
    # right although two of its wrong options tie. Task 1: item 4 right. Item 5 is a filler.
    item = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5]
    task = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, -1, -1]
    answer = [1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0]
    logs = [-1.0, -2, -3, -4, -5, -2, -2, -7, -7, -6.5, -9, -8, 0, 0]
    metrics = EvalMetrics([("commonsense", ["arc", "boolq", "unseen"])])
    metrics.update_choices(0, torch.tensor(logs), choices(item, task, answer))
    assert computed(metrics) == {
        "accuracy/arc": 0.5,
        "accuracy/boolq": 1.0,
        "accuracy": 0.75,  # of tasks, not of items (3 / 5); a task without items does not count
    }
    # Another batch with other item numbers: 1 of 2 wrong.
    metrics.update_choices(0, torch.tensor([-2.0, -1, -3, -1]), choices([0, 0, 1, 1], [1] * 4, [1, 0, 0, 1]))
    values = computed(metrics)
    assert values["accuracy/boolq"] == pytest.approx(2 / 3)
    assert values["accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_several_sets_count_alike():
    metrics = EvalMetrics([("choice", ["a", "b"]), ("plain", []), ("empty", ["c"])])
    metrics.update_loss(0, torch.tensor(4.0), torch.tensor(1.0))
    metrics.update_loss(1, torch.tensor(2000.0), torch.tensor(1000.0))
    metrics.update_choices(
        0, torch.tensor([-1.0, -2, -1, -2]), choices([0, 0, 1, 1], [0, 0, 1, 1], [1, 0, 0, 1])
    )
    assert computed(metrics) == {
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
    values = computed(metrics)
    assert (values["first/accuracy"], values["second/accuracy"]) == (1.0, 0.0)
    assert values["accuracy/arc"] == pytest.approx(1 / 3)


def test_nothing_seen():
    metrics = EvalMetrics([("choice", ["a"]), ("plain", [])])
    assert computed(metrics) == {}
    metrics.update_choices(0, torch.tensor([0.0, 0.0]), choices([0, 0], [-1, -1], [0, 0]))
    metrics.update_loss(1, torch.tensor(0.0), torch.tensor(0.0))
    assert computed(metrics) == {}


def test_loss_and_choices_of_one_set():
    metrics = EvalMetrics([("plain", ["a"])])
    metrics.update_loss(0, torch.tensor(6.0), torch.tensor(2.0))
    metrics.update_choices(0, torch.tensor([-1.0, -2]), choices([0, 0], [0, 0], [1, 0]))
    assert computed(metrics) == {"loss": 3.0, "accuracy": 1.0, "accuracy/a": 1.0}


def test_nan_shows():
    metrics = EvalMetrics([("plain", []), ("other", [])])
    metrics.update_loss(0, torch.tensor(math.nan), torch.tensor(3.0))
    metrics.update_loss(0, torch.tensor(1.0), torch.tensor(1.0))
    metrics.update_loss(1, torch.tensor(1.0), torch.tensor(1.0))
    values = computed(metrics)
    assert math.isnan(values["plain/loss"])
    assert math.isnan(values["loss"])
    assert values["other/loss"] == 1.0


@pytest.mark.parametrize("logs", [[math.nan, -1.0], [-1.0, math.nan], [math.nan, math.nan], [-INF, -INF]])
def test_undefined_likelihoods_are_wrong_answers(logs):
    metrics = EvalMetrics([("choice", ["a"])])
    metrics.update_choices(0, torch.tensor(logs), choices([0, 0], [0, 0], [1, 0]))
    assert computed(metrics)["accuracy/a"] == 0.0


def test_the_first_of_tied_options_is_the_answer():
    metrics = EvalMetrics([("choice", ["first", "second", "nearly", "less"])])
    item = [0, 0, 1, 1, 2, 2, 3, 3]
    logs = [-30.0, -30.0, -30.0, -30.0, -30.0001, -30.0, -30.01, -30.0]
    batch = choices(item, [0, 0, 1, 1, 2, 2, 3, 3], [1, 0, 0, 1, 1, 0, 1, 0])
    metrics.update_choices(0, torch.tensor(logs), batch)
    values = metrics.compute().values()
    # What rounding alone tells apart is the same; what a likelihood tells apart is not.
    assert [values[f"accuracy/{t}"] for t in ("first", "second", "nearly", "less")] == [1, 0, 1, 0]


def test_scores_per_character():
    metrics = EvalMetrics([("choice", ["a"])])
    # The longer option has the lower sum, but the higher mean: item 0 right only by that, item 1 only by sum.
    logs, chars = [-8.0, -6.0, -8.0, -6.0], [8, 4, 8, 4]
    metrics.update_choices(
        0, torch.tensor(logs), choices([0, 0, 1, 1], [0] * 4, [1, 0, 0, 1], chars), torch.tensor([3, 2, 3, 2])
    )
    values = metrics.compute().values()
    assert (values["accuracy/a"], values["acc_norm/a"]) == (0.5, 0.5)
    assert values["nll/a"] == pytest.approx(14 / 5)  # both right options' nats over their five tokens
    metrics.update_choices(0, torch.tensor(logs[:2]), choices([0, 0], [0, 0], [1, 0], chars[:2]))
    values = metrics.compute().values()
    assert (values["accuracy/a"], values["acc_norm/a"]) == pytest.approx((1 / 3, 2 / 3))


def test_standard_errors_are_those_of_the_sample():
    def share(right, items):
        return Counts(items=items, correct=right, correct_norm=right).shares()

    sample = torch.tensor([1.0] * 3 + [0.0] * 7)
    assert share(3, 10)["accuracy"].stderr == pytest.approx(float(sample.std()) / math.sqrt(10))
    assert share(4, 4)["accuracy"].stderr == 0
    assert share(1, 1)["accuracy"].stderr is None
    means = macro([share(3, 10), share(5, 20)])
    one, other = share(3, 10)["accuracy"].stderr, share(5, 20)["accuracy"].stderr
    assert means["accuracy"].value == pytest.approx((0.3 + 0.25) / 2)
    assert means["accuracy"].stderr == pytest.approx(math.hypot(one, other) / 2)
    assert macro([share(3, 10), share(1, 1)])["accuracy"].stderr is None
    assert "generated" not in means


def test_groups_over_items_and_over_tasks():
    metrics = EvalMetrics([("mmlu", ["a", "b", "c"])], groups={"ab": ["a", "b"], "none": ["d"]})
    item = [0, 0, 1, 1, 2, 2, 3, 3]
    task = [0, 0, 0, 0, 0, 0, 1, 1]
    answer = [1, 0] * 4
    logs = [-1.0, -2, -2, -1, -2, -1, -1, -2]  # right, wrong, wrong; right
    metrics.update_choices(0, torch.tensor(logs), choices(item, task, answer))
    values = metrics.compute().values()
    assert values["accuracy/ab"] == 0.5
    assert values["accuracy/ab_stderr"] == pytest.approx(math.sqrt(0.25 / 3))
    assert values["accuracy/ab_macro"] == pytest.approx((1 / 3 + 1) / 2)
    assert not any("none" in name or "/c" in name for name in values)


def test_generated_answers():
    metrics = EvalMetrics([("choice", ["a", "b"])])
    batch = choices([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, -1, -1], [1, 0, 1, 0, 0, 0])
    metrics.update_choices(
        0, torch.tensor([-1.0, -2] * 3), batch, generated=torch.tensor([False, True, True])
    )
    values = metrics.compute().values()
    assert (values["generated/a"], values["generated/b"], values["generated"]) == (0, 1, 0.5)


def test_perplexities():
    metrics = EvalMetrics([("text", []), ("plain", [])])
    metrics.update_loss(0, torch.tensor(6.0), torch.tensor(4.0), words=2, bytes=12)
    metrics.update_loss(0, torch.tensor(2.0), torch.tensor(4.0), words=0, bytes=0)
    metrics.update_loss(1, torch.tensor(2.0), torch.tensor(4.0))
    values = metrics.compute().values()
    assert values["text/perplexity"] == pytest.approx(math.e)
    assert values["text/word_perplexity"] == pytest.approx(math.exp(4))
    assert values["text/byte_perplexity"] == pytest.approx(math.exp(8 / 12))
    assert "plain/perplexity" not in values
