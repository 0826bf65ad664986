import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moka_pl.data.batching.samplers import best_fit_decreasing

CAPACITY = 40
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=80)


def contents(lengths, packs):
    return sorted(sorted(lengths[i] for i in pack) for pack in packs)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.randoms(use_true_random=False))
def test_packs(lengths, random):
    packs = best_fit_decreasing(lengths, CAPACITY)
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in pack) for pack in packs]
    assert all(total <= CAPACITY for total in sums)
    # A row is begun only for what fits into none before it.
    assert all(a + b > CAPACITY for a, b in itertools.combinations(sums, 2))
    # The order of the lengths makes no difference.
    shuffled = random.sample(lengths, len(lengths))
    assert contents(shuffled, best_fit_decreasing(shuffled, CAPACITY)) == contents(lengths, packs)


def test_the_fullest_row_with_room_is_taken():
    assert best_fit_decreasing([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    assert best_fit_decreasing([2, 5, 8, 5], 10) == [[2, 0], [1, 3]]


@pytest.mark.parametrize("length", [0, 11])
def test_lengths_out_of_range(length):
    with pytest.raises(ValueError, match=f"from 1 to 10, got {length}"):
        best_fit_decreasing([3, length], 10)
