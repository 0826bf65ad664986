import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moka_pl.errors import ConfigError
from moka_pl.studies.compare.statistics import (
    Items,
    compare,
    forgotten,
    resample,
    sign_test,
    stack_items,
)


def table(correct, nll, tasks=None):
    n = len(correct)
    return {
        "task": tasks or ["t"] * n,
        "correct": correct,
        "correct_norm": correct,
        "nll": nll,
        "tokens": [2] * n,
    }


def random_items(seeds, p, shift=0.0, n=200, tasks=("one", "other"), start=0):
    random = numpy.random.default_rng(5)
    noise = random.random(n)
    names = [tasks[0] if i < n // 4 else tasks[1] for i in range(n)]
    tables = {}
    for seed in range(start, start + seeds):
        own = numpy.random.default_rng(seed).random(n) * 0.1
        tables[seed] = table(
            [int(x + y < p) for x, y in zip(noise, own, strict=True)], list(noise + own + shift), names
        )
    return stack_items(tables)


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_sign_test_is_the_binomial_tail(wins, losses):
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    assert sign_test(wins, losses) == pytest.approx(min(1.0, 2 * tail))


def test_the_sign_test_takes_thousands_of_items():
    assert sign_test(3000, 3000) == 1.0
    assert 0 < sign_test(1550, 1450) < 0.1
    assert sign_test(5000, 1) < 1e-100


def test_a_real_difference_is_found_and_none_is_not():
    methods = resample({"good": random_items(3, 0.8, -0.2), "bad": random_items(3, 0.5)}, samples=2000)
    found = compare(methods, "good", "bad")
    good, bad = methods["good"].items, methods["bad"].items
    means = [
        numpy.mean([items.correct[:, good.task == task].mean() for task in good.tasks])
        for items in (good, bad)
    ]
    assert found.acc_norm.value == pytest.approx(means[0] - means[1])
    assert 0 < found.acc_norm.low < found.acc_norm.value < found.acc_norm.high
    assert found.acc_norm.p < 0.01
    assert found.nll.value == pytest.approx(-0.1)  # 0.2 an item of two tokens
    assert found.nll.low == pytest.approx(-0.1)
    assert (found.wins > 40, found.losses, found.sign_p < 1e-6) == (True, 0, True)
    back = compare(methods, "bad", "good")
    assert back.acc_norm.value == pytest.approx(-found.acc_norm.value)
    assert (back.wins, back.losses) == (found.losses, found.wins)
    same = compare(methods, "good", "good")
    assert (same.acc_norm.value, same.acc_norm.p, same.sign_p) == (0.0, 1.0, 1.0)


def test_the_interval_is_that_of_independent_items():
    n = 400
    wins = [1] * 60 + [0] * (n - 60)
    losses = [0] * 60 + [1] * 40 + [0] * (n - 100)
    nll = [1.0] * n
    methods = resample({"a": stack_items({0: table(wins, nll)}), "b": stack_items({0: table(losses, nll)})})
    found = compare(methods, "a", "b").acc_norm
    error = math.sqrt((100 / n - (20 / n) ** 2) / n)
    assert found.value == pytest.approx(20 / n)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_tasks_weigh_the_same_and_seeds_in_common_only_are_compared():
    items = random_items(2, 0.6)
    methods = resample({"a": items, "b": random_items(2, 0.6, start=1)}, samples=200)
    assert compare(methods, "a", "b").seeds == (1,)
    apart = resample({"a": items, "b": random_items(1, 0.6, start=7)}, samples=200)
    assert compare(apart, "a", "b") is None
    weights = items.task_weights
    assert weights[items.task == "one"].sum() == pytest.approx(0.5)


def test_other_items_are_not_paired():
    with pytest.raises(ConfigError, match="other items"):
        resample({"a": random_items(1, 0.5), "b": random_items(1, 0.5, n=100)}, samples=10)
    with pytest.raises(ConfigError, match="different items"):
        stack_items({0: table([1], [1.0]), 1: table([1, 0], [1.0, 2.0])})


def test_the_error_of_the_loss_is_that_of_a_ratio():
    items = Items((0,), numpy.array(["t"] * 3), None, numpy.array([[1.0, 2.0, 6.0]]), numpy.ones(3))
    share = items.nll_per_token()
    assert share.value == pytest.approx(3.0)
    assert share.stderr == pytest.approx(numpy.std([1, 2, 6], ddof=1) / math.sqrt(3))


def test_what_is_forgotten_is_paired_by_window():
    random = numpy.random.default_rng(0)
    tokens = random.integers(50, 100, 40).tolist()
    before = (3.0 * numpy.array(tokens) + random.normal(size=40) * 40).tolist()

    def after(rise):
        by_token = [value + rise * count for value, count in zip(before, tokens, strict=True)]
        return {"text_tokens": tokens, "text_before": before, "text_after": by_token}

    one = forgotten({0: after(0.1), 1: after(0.3)}, {1: after(0.2), 2: after(0.0)})
    assert one.difference.value == pytest.approx(0.2)
    assert one.difference.stderr == pytest.approx(0.1)  # of two seeds; all windows rise alike
    assert one.after.value == pytest.approx(one.before.value + 0.2)
    assert one.before.stderr > 0.05
    assert one.over_reference.value == pytest.approx(0.1)  # the seed that both have
    assert forgotten({0: after(0.1)}).over_reference is None
    assert forgotten({0: {"nll": [1.0]}}) is None
