import dataclasses
import math

import pytest

from moka_pl.studies.compare import runs
from moka_pl.studies.compare.runs import Store, all_rates, run_of
from moka_pl.studies.compare.schedule import Clock, Plan, Task, Times
from moka_pl.studies.compare.suite import read_suite

SUITE = """
data: {class_path: moka_pl.data.CommonsenseData}
seeds: [0, 1]
frozen: false
methods:
  - {name: one, learning_rates: [0.1, 0.2], adapter: {components: 2}}
  - {name: two, learning_rates: [0.1, 0.2], adapter: {components: 3}}
"""
OTHER = (
    SUITE.replace("name: two", "name: same as two").replace("name: one", "name: new").replace(": 2}", ": 4}")
)


@pytest.fixture
def suites(tmp_path):
    found = []
    for name, text in (("first", SUITE), ("second", OTHER)):
        file = tmp_path / f"{name}.yaml"
        file.write_text(text, encoding="utf-8")
        found.append(read_suite(file))
    return found


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "out")


def words(task):
    return None if task is None else (task.run.method, task.run.rate, task.run.seed, task.test)


def trained(loss, seconds=10.0):
    return {"trained": {"validation_loss": loss, "seconds": seconds}}


def whole(task, loss):
    return trained(loss) | {"tested": {"key": task.run.test_key, "seconds": 2.0}}


def test_a_method_goes_on_as_soon_as_its_own_rates_are_known(suites, store):
    plan = Plan(suites[:1], store)
    first, second, third = plan.next(), plan.next(), plan.next()
    assert [words(task) for task in (first, second, third)] == [
        ("one", 0.1, 0, False),
        ("one", 0.2, 0, False),
        ("two", 0.1, 0, False),
    ]
    plan.end(first, trained(2.0))
    assert words(plan.next()) == ("two", 0.2, 0, False)
    assert plan.next() is None  # until another one has ended
    plan.end(second, trained(1.0))
    picked = [plan.next(), plan.next()]
    assert [words(task) for task in picked] == [("one", 0.2, 0, True), ("one", 0.2, 1, True)]
    assert plan.next() is None


def test_what_fails_is_left_out_and_not_tried_again(suites, store):
    plan = Plan(suites[:1], store)
    tasks = [plan.next() for _ in range(4)]
    for task in tasks:
        plan.end(task, {"error": "no"} if task.run.method == "one" or task.run.rate == 0.1 else trained(1.0))
    rest = [words(plan.next()) for _ in range(3)]
    assert rest == [("two", 0.2, 0, True), ("two", 0.2, 1, True), None]


def test_runs_in_common_are_done_once_and_suites_come_in_their_order(suites, store):
    plan = Plan(suites, store)
    begun = []
    while (task := plan.next()) is not None:
        begun.append(task)
        plan.end(task, whole(task, 1.0 + task.run.rate) if task.test else trained(1.0 + task.run.rate))
    assert len({(task.run.key, task.test) for task in begun}) == len(begun)
    assert list(dict.fromkeys(task.run.method for task in begun)) == ["one", "two", "new"]
    assert [words(task) for task in begun][2:4] == [("one", 0.1, 0, True), ("one", 0.1, 1, True)]
    assert plan.remaining().tasks == []


@pytest.mark.parametrize("other", [{"forgetting": {"class_path": "x"}}, {"test": {"class_path": "x"}}])
def test_suites_that_test_a_run_differently_test_it_once_each(suites, store, other):
    plan = Plan([suites[0], dataclasses.replace(suites[0], name="other", **other)], store)
    tests = []
    while task := plan.next():
        outcome = whole(task, 1.0) if task.test else trained(1.0)
        if task.test:
            tests.append((task.run.key, task.run.test_key, task.run.text_key))
            outcome["tested"]["text"] = task.run.text_key
        plan.end(task, outcome)
    assert len(tests) == len(set(tests))
    assert {key for key, _, _ in tests} == {t.run.key for t, _ in plan.known() if t.test}


def test_a_test_without_the_plain_text_is_not_one_with_it(suites):
    plain = run_of(suites[0], suites[0].methods[0], 0.1, 0)
    with_text = dataclasses.replace(plain, beside={"forgetting": {"class_path": "x"}})
    assert (plain.key, plain.test_key) == (with_text.key, with_text.test_key)
    outcomes = [{"tested": {"key": plain.test_key, "text": text}} for text in (None, with_text.text_key, "y")]
    assert [runs.tested_with(outcome, with_text) for outcome in outcomes] == [False, True, False]
    assert all(runs.tested_with(outcome, plain) for outcome in outcomes)


def test_what_is_left_is_counted_once(suites, store):
    plan = Plan(suites, store)
    remaining = plan.remaining()
    # three methods that differ, two rates, two seeds
    assert (len(remaining.tasks), len(remaining.later)) == (6, 6)
    for _ in range(2):
        plan.end(plan.next(), trained(1.0))
    remaining = plan.remaining()
    assert (len(remaining.tasks), len(remaining.later)) == (6, 4)
    assert [task for task in remaining.tasks if task.test] == [
        Task(run_of(suites[0], suites[0].methods[0], 0.1, seed), True) for seed in (0, 1)
    ]


def widening(suites, widen):
    return [dataclasses.replace(suites[0], widen=widen, methods=suites[0].methods[:1])]


@pytest.mark.parametrize(
    ("best", "widen", "tried"),
    [
        (0.05, 9, [0.1, 0.2, 0.05, 0.025]),
        (0.8, 9, [0.1, 0.2, 0.4, 0.8, 1.6]),
        (0.8, 1, [0.1, 0.2, 0.4]),
        (0.8, 0, [0.1, 0.2]),
        (0.15, 1, [0.1, 0.2, 0.4]),
    ],
)
def test_a_sweep_is_widened_until_its_best_is_no_edge(suites, store, best, widen, tried):
    (suite,) = widening(suites, widen)
    for _ in range(2):  # another plan goes on with what the store has
        plan = Plan([suite], store)
        begun = []
        while (task := plan.next()) is not None:
            begun.append(task)
            outcome = whole(task, 0.0) if task.test else trained(abs(math.log(task.run.rate / best)))
            outcome["trained"]["validation_loss"] = abs(math.log(task.run.rate / best))
            store.write(task.run, outcome)
            plan.end(task, outcome)
        sweep = [task.run.rate for task in begun if not task.test]
        assert sweep == (tried if begun else [])
        method = all_rates(suite, suite.methods[0], store.read)
        assert list(method.learning_rates) == tried
    assert {task.run.rate for task, _ in plan.known()} == set(tried)


def test_a_sweep_is_widened_only_when_all_of_it_has_ended(suites, store):
    plan = Plan(widening(suites, 2), store)
    first, second = plan.next(), plan.next()
    plan.end(second, trained(1.0))
    assert plan.next() is None
    assert (len(plan.remaining().tasks), len(plan.remaining().later)) == (1, 2)
    plan.end(first, {"error": "no"})  # its only rate that worked is the highest
    third = plan.next()
    assert words(third) == ("one", 0.4, 0, False)
    assert (len(plan.remaining().tasks), len(plan.remaining().later)) == (1, 2)
    plan.end(third, trained(None))  # diverged: nothing to gain beyond
    assert words(plan.next()) == ("one", 0.2, 0, True)


def test_nothing_is_widened_without_a_rate_that_worked(suites, store):
    plan = Plan(widening(suites, 2), store)
    for task in (plan.next(), plan.next()):
        plan.end(task, trained(None))
    assert plan.next() is None
    assert plan.remaining().tasks == []


def test_only_what_fits_is_begun(suites, store):
    plan = Plan(suites[:1], store)
    assert words(plan.next(lambda task: task.run.method == "two")) == ("two", 0.1, 0, False)
    assert plan.next(lambda task: False) is None
    assert words(plan.next()) == ("one", 0.1, 0, False)


def test_times_are_those_of_the_nearest_relatives(suites):
    one, two = (Task(run_of(suites[0], method, 0.1, 0), True) for method in suites[0].methods)
    times = Times()
    assert times.expected(one, {}) == 0
    times.add(one, whole(one, 1.0), {})
    assert times.expected(one, {}) == 12
    assert times.expected(two, {}) == 12
    assert times.expected(two, trained(1.0)) == 2  # only its test is left
    slow = trained(1.0, seconds=40.0)
    times.add(two, slow, {})
    assert times.expected(two, {}) == 42
    assert times.expected(one, {}) == 12
    times.add(two, slow, slow)  # was trained before: tells nothing of a training
    assert times.expected(two, {}) == 42


def test_the_clock_begins_nothing_that_would_end_too_late(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(minutes=2, reserve=20)
    assert clock.left() == 100
    assert clock.has(80)
    assert not clock.has(90)  # runs may take longer than expected
    now[0] += 200
    assert clock.left() == 0
    assert not clock.has(0)
    assert Clock().has(1e9)
