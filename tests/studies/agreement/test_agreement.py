import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moka_pl.errors import ConfigError
from moka_pl.studies.agreement.agreement import TOLERANCE, Item, agreement_table, compare

ITEM = Item([[1, 2, 3], [1, 2, 4]], [2, 2], [-3.0, -2.0], [30, 5], 1)
"""Right by the sum, wrong per character (-0.1 against -0.4)."""


def test_scores_per_character() -> None:
    assert ITEM.right()
    assert not ITEM.right_norm()
    assert not replace(ITEM, answer=0).right()
    assert replace(ITEM, answer=0).right_norm()
    assert not replace(ITEM, acc=False).right()
    assert replace(ITEM, acc_norm=True).right_norm()


def test_of_tied_options_the_first_counts() -> None:
    tied = replace(ITEM, log_likelihoods=[-2.0, -2.0])
    assert replace(tied, answer=0).right()
    assert not tied.right()
    assert compare("x", [tied, ITEM], [tied, ITEM]).ties == 1


def test_the_same_scores_agree() -> None:
    close = replace(ITEM, log_likelihoods=[-3.0 + TOLERANCE / 2, -2.0])
    found = compare("x", [ITEM, ITEM], [ITEM, close], {"accuracy": 1.0, "acc_norm": 0.0})
    assert found.agrees
    assert (found.items, found.acc, found.acc_norm, found.ties) == (2, (1.0, 1.0), (0.0, 0.0), 0)
    assert found.largest == pytest.approx(TOLERANCE / 2)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tokens": [[1, 2, 3], [1, 2, 5]]}, "tokens"),
        ({"borders": [2, 1]}, "tokens"),
        ({"answer": 0}, "answer"),
        ({"chars": [30, 6]}, "answer"),
        ({"log_likelihoods": [-1.0, -2.0]}, "acc"),
        ({"acc": False}, "acc"),
        ({"acc_norm": True}, "acc_norm"),
        ({"log_likelihoods": [-3.1, -2.0]}, "log-likelihood"),
        ({"log_likelihoods": [math.nan, -2.0], "acc": True, "acc_norm": False}, "log-likelihood"),
        ({"log_likelihoods": [-3.0, math.nan], "acc": True, "acc_norm": False}, "log-likelihood"),
        ({"tokens": [[1], [2], [3]], "log_likelihoods": [-3.0, -2.0, -9.0], "chars": [30, 5, 9]}, "tokens"),
    ],
)
def test_what_differs_is_told(change: dict, what: str) -> None:
    found = compare("x", [ITEM, ITEM], [ITEM, replace(ITEM, **change)])
    assert not found.agrees
    (difference,) = found.differences
    assert (difference.index, difference.what) == (1, what)
    assert f"x, item 1: {what}; package [-3.0000, -2.0000]" in agreement_table([found])


def test_what_the_package_reports_is_compared_with_the_harness() -> None:
    found = compare("x", [ITEM], [ITEM], {"accuracy": 0.0})
    assert not found.agrees
    assert "x: accuracy is 0.0000 by the package's test, 1.0000 by the harness" in agreement_table([found])


def test_sides_of_different_lengths_cannot_be_compared() -> None:
    for package, harness in (([ITEM], [ITEM, ITEM]), ([], [])):
        with pytest.raises(ConfigError, match="nothing to compare"):
            compare("x", package, harness)


def test_the_table() -> None:
    table = agreement_table([compare("x", [ITEM], [ITEM], {"accuracy": 1.0})]).splitlines()
    assert len(table) == 3
    assert table[2] == "| x | 1 | 1.0000 / 1.0000 | 0.0000 / 0.0000 | 1.0000 / - | 0 | 0 | 0.0e+00 |"


@given(st.lists(st.floats(-50, -0.1), min_size=2, max_size=5), st.integers(0, 4))
def test_an_item_agrees_with_itself(scores: list[float], answer: int) -> None:
    options = len(scores)
    item = Item([[1, 2]] * options, [1] * options, scores, [3] * options, answer % options)
    assert compare("x", [item], [item]).agrees
    moved = replace(item, log_likelihoods=[score - 1 for score in scores])
    assert not compare("x", [item], [moved]).agrees
