import math
from dataclasses import replace
from pathlib import Path

import pytest

from moka_pl.studies.compare.across.transfer import markdown, rules, transfer
from moka_pl.studies.compare.report import Entry, Report, Row
from moka_pl.studies.compare.runs import Trial
from moka_pl.studies.compare.suite import read_suite

RULES = rules()
SUITE = read_suite(Path(__file__).parents[4] / "scripts" / "suites" / "servable-scaling.yaml")


def report(loss, suite=SUITE):
    rows = []
    for method in suite.methods:
        tried = tuple(Trial(rate, loss(method.adapter, rate)) for rate in method.learning_rates)
        best = min((t for t in tried if t.loss is not None), key=lambda t: t.loss, default=None)
        entry = Entry(method.name, best and best.rate, False, tried, {}, {}, {}, ())
        rows.append(Row(entry, None, {}, None, None, [], [], None, None))
    return Report(suite, rows, [])


def needs(rule):
    """A loss that is lowest at 8e-3 times what a rule leaves to be made up for by the rate."""

    def loss(adapter, rate):
        wanted = RULES[rule](math.sqrt(adapter["rank"]), adapter["components"])
        return 3 + math.log2(rate / 8e-3 * adapter["scaling"] / wanted) ** 2

    return loss


def test_the_rules_agree_at_the_reference():
    assert [rule(4, 1) for rule in RULES.values()] == [1] * 6


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_that_the_losses_follow_loses_nothing(rule):
    found = transfer(report(needs(rule)))
    assert found.rate == 8e-3
    assert found.winner == rule
    assert set(found.rules) == set(RULES)
    assert found.sizes == [(4, 1), (16, 1), (16, 2), (16, 4), (64, 1)]
    assert {one.regret for one in found.rules[rule].values()} == {0}
    assert {one.best for one in found.rules[rule].values()} == {8e-3}
    assert any(one.regret > 0.2 for name in found.rules if name != rule for one in found.rules[name].values())
    first = markdown(found).splitlines()[4]
    assert first.startswith(f"| {rule} | 0.008: 3.0000 (+0.0000) |")
    assert first.endswith("| 0.0000 | 0.0000 |")


def test_a_rule_with_an_unknown_loss_takes_no_part():
    known = needs("c")
    found = transfer(
        report(lambda adapter, rate: None if adapter["scaling"] == 0.5 else known(adapter, rate))
    )
    assert set(RULES) - set(found.rules) == {"c · 4 / k", "√c · 4 / k"}


def test_sizes_that_were_not_run_are_left_out():
    known = needs("√c")
    found = transfer(report(lambda adapter, rate: None if adapter["rank"] == 64 else known(adapter, rate)))
    assert found.sizes == [(4, 1), (16, 1), (16, 2), (16, 4)]
    assert found.winner == "√c"


def test_nothing_is_told_of_one_scaling_or_without_results():
    assert transfer(report(lambda adapter, rate: None)) is None
    one = [method for method in SUITE.methods if "s =" not in method.name]
    assert transfer(report(needs("c"), replace(SUITE, methods=tuple(one)))) is None
